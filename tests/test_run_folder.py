"""A run folder is copied, moved, and used from any working directory and by a user who may not write it."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tests.ensemble.conftest import experiment
from tests.processes import without_root
from tests.synthetic_run import write_run
from triderm_dist import commands
from triderm_dist.cli import read_settings
from triderm_dist.commands import report, stack
from triderm_dist.config import Experiment, save


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A run with a report, made with a relative `output`."""
    folder = tmp_path_factory.mktemp("original") / "run"
    write_run(folder, lesions=120, models=("trimodal",))
    config = experiment(folder)
    before = Path.cwd()
    os.chdir(folder.parent)
    try:
        save(config.model_copy(update={"output": "run"}), Path("run/config.yaml"))
        program(stack, "run=run")
        program(report, "run=run")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "A" / "run")


def program(module, *words: str) -> None:
    """Run a program in this process."""
    kind = next(
        each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Experiment)
        and each.__module__ == module.__name__
    )  # fmt: skip
    module.main(read_settings(kind, words))


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_work_on_a_copy_leaves_the_original_unchanged(run, tmp_path, monkeypatch):
    before, copy = hashes(run), shutil.copytree(run, tmp_path / "B" / "run")
    for path in (copy / "ensemble.json", copy / "stack.ubj", copy / "report.html"):
        path.unlink()
    monkeypatch.chdir(run.parent)  # where the relative `output` that the run was made with is the original
    program(stack, f"run={copy}")
    program(report, "--config", str(copy / "config.yaml"))
    assert hashes(run) == hashes(copy) == before


def test_read_only_run_is_reported_elsewhere_and_refused_where_it_is_written(run, tmp_path):
    page = (run / "report.html").read_bytes()
    for path in (run, *run.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = hashes(run)
    done = without_root("report", f"run={run}", f"output={tmp_path}/out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    for name, advice in (("report", "write the results elsewhere (run="), ("stack", "copy the run and name the copy")):
        done = without_root(name, f"run={run}", folder=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {run}: this program writes into it, and it is read-only"), done.stderr
        assert advice in done.stderr
    assert hashes(run) == before


def test_every_program_of_an_experiment_takes_run(run):
    taken = 0
    for name in commands.names():
        module = __import__(f"triderm_dist.commands.{name}", fromlist=["main"])
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Experiment) and kind.__module__ == module.__name__:
                assert read_settings(kind, [f"run={run}"]).folder == run
                taken += 1
    assert taken >= 9
