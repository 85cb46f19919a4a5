"""The core without its extras: what works, and the line that names the extra of what does not."""

import re
import subprocess
import sys
import tomllib

import pytest

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.runtime.extras import CORE, EXTRA_OF, MissingPackage, explain, install_command, require

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {
    "open_clip_torch": "open_clip",
    "pillow": "PIL",
    "pillow-heif": "pillow_heif",
    "opencv-python-headless": "cv2",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
"""Import names of packages that are imported by another name than they are installed by."""

BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in blocked:
    assert name not in sys.modules, name
"""
"""Hides the packages in `blocked` from a new interpreter."""


def run_without(blocked: tuple[str, ...], code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter in which packages cannot be imported."""
    code = f"blocked = {blocked!r}\n{BLOCK}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )


def names_in(requirements: list[str]) -> set[str]:
    """Return the import names of the packages in requirements, without those of other extras."""
    found = {re.match(r"[\w-]+", line).group() for line in requirements} - {"triderm-dist"}
    return {IMPORT_NAMES.get(name, name.removesuffix("-cu13")) for name in found}


def test_tables_agree_with_the_declared_requirements():
    assert set(CORE) == names_in(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    for extra in set(EXTRA_OF.values()):
        own = {name for name, other in EXTRA_OF.items() if other == extra}
        assert own <= names_in(extras[extra]) | {"aiohttp"}, extra  # aiohttp: of fsspec[http]
    (line,) = extras["all"]
    assert set(EXTRA_OF.values()) == set(re.search(r"\[(.*)\]", line).group(1).split(","))


def test_packages_for_linux_are_declared_for_linux_only():
    extras = PROJECT["optional-dependencies"]
    for name in ("deepspeed", "xgboost-cu13"):
        (line,) = (line for lines in extras.values() for line in lines if re.match(rf"{name}\b", line))
        assert line.endswith("; sys_platform == 'linux'")
    assert any(re.match(r"xgboost>=.*; sys_platform != 'linux'", line) for line in extras["stack"])
    assert not any("sys_platform" in line or "cu13" in line for line in PROJECT["dependencies"])


def test_missing_package_gives_the_command_that_installs_it():
    require("anything", "yaml")
    with pytest.raises(MissingPackage, match=re.escape("x needs no_such_package; pip install no_such_package, or y")):
        require("x", "yaml", "no_such_package", instead="y")
    assert install_command("optuna") == "pip install 'triderm-dist[search]'"
    assert explain(ModuleNotFoundError(name="ray.tune")) == "this needs ray; pip install 'triderm-dist[search]'"
    assert "activate the environment" in explain(ModuleNotFoundError(name="pydantic"))
    assert explain(ModuleNotFoundError(name="triderm_dist.no_such_module")) is None


def test_without_any_package_programs_say_what_to_activate():
    done = run_without(CORE, "import runpy; runpy.run_module('triderm_dist', run_name='__main__')", "doctor")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        f"error: pydantic is not installed for {sys.executable}: activate the environment of triderm-dist "
        "(. .venv/bin/activate), or install it (pip install triderm-dist)"
    ]


@pytest.mark.slow
def test_every_module_imports_without_extras_and_without_locks():
    code = """
import importlib, pkgutil, triderm_dist
for module in pkgutil.walk_packages(triderm_dist.__path__, "triderm_dist."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    done = run_without((*EXTRA_OF, "fcntl", "resource"), code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_heic_photo_names_its_extra():
    code = """
from triderm_dist.data.shards.photos import PhotoError, prepare_photo
try:
    prepare_photo(bytes(4) + b"ftypheic", None)
except PhotoError as error:
    print(error)
"""
    done = run_without(("pillow_heif",), code)
    says = "a HEIC, which needs pillow-heif: pip install 'triderm-dist[photos]', or convert it\n"
    assert done.stdout == says, done.stderr


PROGRAMS = """
import importlib, sys, traceback

def run(name, *words):
    sys.argv = [name, *words]
    try:
        importlib.import_module(f"triderm_dist.commands.{name}").start()
    except SystemExit as end:
        return end.code
    return 0

experiment, source, test = ["--config", sys.argv[1]], *sys.argv[2:]
assert not run("pack", f"source={source}", f"output={source}/shards")
assert not run("pack", f"source={test}", f"output={test}/shards")
for name in ("crossval", "stack", "predict", "report"):
    assert not run(name, *experiment), name
assert run("crossval", *experiment, "parallel_folds=true", f"output={source}/other") == 2
assert run("stack", *experiment, "stack.enabled=true") == 2
assert run("search", *experiment, "space=losses", "search.model=golden") == 2
assert run("pipeline", *experiment, "stack.enabled=true") == 2
assert run("pipeline", *experiment, "launcher=deepspeed_zero1") == 2
"""


@pytest.mark.slow
def test_training_and_predicting_need_no_extra(make_challenge, tmp_path):
    source = make_challenge().folder
    test = make_challenge("test", prefix="MILK10k_Test", labeled=False).folder
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        f"base: {ROOT}/tests/golden_losses/dual_cnn.yaml\n"
        f"output: {tmp_path}/run\n"
        f"data: {{shards: {source}/shards, test_shards: {test}/shards}}\n"
        "train: {epochs: 1, trackers: [tensorboard]}\n"
        "predict: {transforms: 2}\n"
        "stack: {enabled: false}\n",
        encoding="utf-8",
    )
    done = run_without((*EXTRA_OF, "tensorboardX", "fcntl"), PROGRAMS, str(experiment), str(source), str(test))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "golden fold 1: no TensorBoard files: pip install 'triderm-dist[track]'" in done.stdout
    assert (tmp_path / "run" / "submission.csv").is_file() and (tmp_path / "run" / "report.html").is_file()
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: parallel_folds needs ray; pip install 'triderm-dist[search]'",
        "error: stack.kind=xgboost needs xgboost; pip install 'triderm-dist[stack]', or set stack.enabled=false",
        "error: triderm search needs ray; pip install 'triderm-dist[search]'",
        "error: stack.kind=xgboost needs xgboost; pip install 'triderm-dist[stack]', or set stack.enabled=false",
        "error: DeepSpeed ZeRO needs deepspeed; pip install 'triderm-dist[deepspeed]'",
    ]
