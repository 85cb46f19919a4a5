"""The three rules that keep the rooms apart, and programs that start at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM_ROOMS = ("shards", "launch", "tune")
PROGRAMS = [path for room in PROGRAM_ROOMS for path in sorted((ROOT / room).glob("*.py")) if path.stem != "__init__"]
# Each room may import those before it; data and models stand side by side, and so do losses, optim and metrics.
FLOORS = [("schema", "files"), ("config",), ("cli",), ("stages",), ("data", "models"), ("losses", "optim", "metrics")]
AFTER_TRAINING = (
    "oof", "calibration", "align", "columns", "stacking", "ensemble", "final", "submission", "predict", "report",
)  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def library() -> list[Path]:
    return sorted((ROOT / "triderm_dist").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "triderm_dist").parts[0].removesuffix(".py")


def test_imports_point_down():
    for path in library():
        room = room_of(path)
        floor = next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)
        if floor is None:
            continue
        allowed = {name for rooms in FLOORS[:floor] for name in rooms} | {room}
        if floor == len(FLOORS) - 1:
            allowed |= set(FLOORS[-1])
        used = {name.split(".")[1] for name in imports_of(path) if name.startswith("triderm_dist.")}
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {used - allowed}"


def test_what_follows_training_imports_no_engine():
    for path in library():
        if room_of(path) in AFTER_TRAINING:
            assert not any(name.startswith("triderm_dist.engine") for name in imports_of(path)), path


def test_the_library_imports_no_program_and_programs_not_one_another():
    for path in [*library(), *PROGRAMS]:
        assert not any(name.split(".")[0] in PROGRAM_ROOMS for name in imports_of(path)), path


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_help_is_light_and_complete(program):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('{program.parent.name}.{program.stem}', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'ray', 'xgboost', 'deepspeed', 'pandas', 'matplotlib', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"python -m {program.parent.name}.{program.stem}" in done.stdout or "accelerate launch" in done.stdout
    assert "key.subkey=value" in done.stdout


def test_no_pickle_and_no_unsafe_loading():
    for path in [*library(), *PROGRAMS]:
        text = path.read_text(encoding="utf-8")
        assert not {"pickle", "joblib", "dill"} & {name.split(".")[0] for name in imports_of(path)}, path
        assert "weights_only=False" not in text and "allow_pickle=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
