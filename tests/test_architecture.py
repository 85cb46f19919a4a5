"""Layers, import cycles, light start-up, and safe loading."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist import commands
from triderm_dist.tasks import load_task

LIBRARY = ROOT / "triderm_dist"
ENTRY_POINTS = ("shards", "launch", "tune")
PROGRAMS = [path for name in ENTRY_POINTS for path in sorted((ROOT / name).glob("*.py")) if path.stem != "__init__"]
# A module imports only from its own row and the rows above it; docs/architecture.md prints this list.
LAYERS = [
    ("schema", "runtime", "files", "file_kinds", "checksums"),
    ("settings", "config", "environment", "tasks", "cli", "stages"),
    ("data",),
    ("models",),
    ("losses", "optim", "metrics", "intervals", "submission", "predictions"),
    ("distributed",),
    ("monitoring",),
    ("engine",),
    ("ensemble",),
    ("report",),
    ("inference",),
    ("search", "doctor"),
    ("commands",),
]
# These packages read the files of a training, and must work without the engine.
WITHOUT_ENGINE = ("ensemble", "report")


def imports_of(path: Path) -> set[str]:
    """Return all modules that a file imports: at its top, inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def library() -> list[Path]:
    return sorted(LIBRARY.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """Return the package or top-level module that a module belongs to, such as `data`."""
    return module.split(".")[1] if "." in module else ""


def test_every_package_of_the_library_has_a_layer():
    parts = {package_of(module_of(path)) for path in library()} - {"", "__main__"}
    assert parts == {name for layer in LAYERS for name in layer}


def test_modules_import_only_from_rows_above():
    for path in library():
        own = package_of(module_of(path))
        row = next((i for i, layer in enumerate(LAYERS) if own in layer), len(LAYERS) - 1)
        allowed = {name for layer in LAYERS[: row + 1] for name in layer} - {""}
        if own in WITHOUT_ENGINE:
            allowed -= {"engine"}
        used = {package_of(name) for name in imports_of(path) if name.startswith("triderm_dist.")}
        assert used - {"__version__"} <= allowed, f"{path.relative_to(ROOT)} imports {used - allowed}"


def test_no_import_cycles():
    modules = {module_of(path): path for path in library()}
    graph = {}
    for module, path in modules.items():
        names = imports_of(path) & set(modules)
        # `from package import module` also runs the package's __init__, which may not import the module.
        graph[module] = {name for name in names if not module.startswith(f"{name}.")} - {module}
        graph[module] -= {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", ["fold", "predict_test", "embed", "explain"])
def test_inference_does_not_import_the_trainer(name):
    modules = {module_of(path): path for path in library()}
    reached, pending = set(), {f"triderm_dist.engine.{name}"}
    while pending:
        reached |= pending
        pending = {found for module in pending for found in imports_of(modules[module]) & set(modules)} - reached
    assert not reached & {f"triderm_dist.engine.{part}" for part in ("trainer", "step", "crossval")}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_entry_points_have_the_summary_of_their_program(path):
    summary, _, rest = path.read_text(encoding="utf-8").partition("\n")
    program = re.search(r"triderm_dist/commands/\w+\.py", rest)
    assert program and (ROOT / program[0]).read_text(encoding="utf-8").startswith(f"{summary}\n")


def test_no_module_imports_a_program():
    for path in [*library(), *PROGRAMS]:
        assert not any(name.split(".")[0] in ENTRY_POINTS for name in imports_of(path)), path


# The reader of MILK10k's tables, and the writer of synthetic ones.
MILK10K_MODULES = ("data/readers/milk10k/", "data/synthetic/milk10k.py")


def test_only_its_task_and_reader_name_what_milk10k_holds():
    """Any other module takes diagnoses, columns and categories from the task."""
    task = load_task("milk10k")
    columns = [task.columns.image, task.columns.view, *(each.column for each in task.fields), "skin_tone"]
    sites = next(each.categories for each in task.fields if each.name == "site")
    # `site`, `hand` and others are words of any text.
    words = {*task.diagnosis_names, "MONET", *(word for word in (*columns, *sites) if "_" in word)}
    named = re.compile(rf"(?<![A-Za-z])({'|'.join(sorted(words))})(?![A-Za-z])")
    for path in library():
        if path.relative_to(LIBRARY).as_posix().startswith(MILK10K_MODULES) or path.parent.name == "tasks":
            continue
        text = path.read_text(encoding="utf-8")
        if path == LIBRARY / "schema" / "__init__.py":  # other programs import the default diagnoses from there
            text = re.sub(r"^DIAGNOSES: .*?^\)$", "", text, flags=re.M | re.S)
        found = [f"{path.relative_to(ROOT)}: {line.strip()}" for line in text.splitlines() if named.search(line)]
        assert not found, "\n".join(found)


MODULES = [
    *(f"{path.parent.name}.{path.stem}" for path in PROGRAMS),
    *(f"triderm_dist.commands.{name}" for name in commands.names()),
]


def run_module(module, words):
    """Run a module as a program; return what it prints, and the names of the modules that it imports."""
    code = (
        "import runpy, sys\n"
        "before = set(sys.modules)\n"
        f"sys.argv = ['x', *{words}]\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(*(name for name in set(sys.modules) - before if '.' not in name), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("module", MODULES)
def test_help_is_complete_without_heavy_imports(module):
    printed, imported = run_module(module, ["--help"])
    heavy = {"torch", "ray", "xgboost", "deepspeed", "pandas", "matplotlib", "timm"} & imported
    assert not heavy, heavy
    name = "synthetic" if module == "shards.demo" else module.rpartition(".")[2]
    assert f"triderm {name}" in printed or "accelerate launch" in printed
    assert "key.subkey=value" in printed or name in ("ranks", "config", "task")


SETTINGS_PACKAGES = {
    "numpy",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "typing_extensions",
    "yaml",
}
"""What reading settings needs."""


@pytest.mark.parametrize(
    ("words", "allowed"),
    [(["--help"], set()), (["config", "list"], SETTINGS_PACKAGES), (["train", "--help"], SETTINGS_PACKAGES)],
)
def test_programs_start_with_few_packages(words, allowed):
    """The time that a program takes to start is that of its imports."""
    _, imported = run_module("triderm_dist", words)
    assert imported & set(packages_distributions()) - {"triderm_dist", "_yaml"} <= allowed


def test_no_pickle_and_no_unsafe_loading():
    for path in [*library(), *PROGRAMS]:
        text = path.read_text(encoding="utf-8")
        assert not {"pickle", "joblib", "dill"} & {name.split(".")[0] for name in imports_of(path)}, path
        assert "weights_only=False" not in text and "allow_pickle=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
