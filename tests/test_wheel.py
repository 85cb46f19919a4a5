"""The wheel and the source distribution are complete; an installed wheel has the features of a clone, in any folder."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS, ROOT
from triderm_dist import __version__
from triderm_dist.commands.config import KINDS
from triderm_dist.config import shipped_names
from triderm_dist.runtime.extras import EXTRA_OF
from triderm_dist.tasks import task_names

pytest.importorskip("hatchling", reason="builds the wheel: pip install hatchling")


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a source tree or source distribution, without the network."""
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, timeout=HANG_SECONDS)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def programs(wheel: Path) -> Path:
    """Folder of the programs in a virtual environment with the wheel and the packages of this environment."""
    folder = wheel.parent
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, timeout=HANG_SECONDS)
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python.parent


def run(programs: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a folder outside the clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": ""}
    command = [str(programs / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)


def output(programs: Path, folder: Path, *words: str) -> str:
    done = run(programs, folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_all_files_of_the_package(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "triderm_dist").rglob("*") if path.is_file()}
    wanted = {name for name in package if name.endswith((".py", ".yaml", "py.typed"))}
    assert {"triderm_dist/py.typed", "triderm_dist/tasks/milk10k.yaml"} < wanted and wanted <= set(files)
    assert not [name for name in files if name.startswith(("tests/", "launch/", "benchmarks/"))]


def test_metadata_is_complete(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Keywords"] and metadata["Author"] and metadata.get_all("Project-URL")
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux", "Operating System :: MacOS"} <= set(
        metadata.get_all("Classifier")
    )
    assert set(metadata.get_all("Provides-Extra")) >= {*EXTRA_OF.values(), "all", "dev", "docs"}
    assert metadata["Description-Content-Type"] == "text/markdown" and "## Quick start" in metadata.get_payload()


def test_source_distribution_holds_all_files_and_builds_the_same_wheel(wheel, tmp_path):
    words = ["hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, timeout=HANG_SECONDS, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    assert {"PKG-INFO", "tests/conftest.py", "launch/train.py", "benchmarks/loader.py", "requirements.lock"} <= files
    assert {name for name in tracked if name and (ROOT / name).is_file()} <= files
    (tmp_path / "built").mkdir()
    built = build_wheel(path, tmp_path / "built")
    assert set(zipfile.ZipFile(built).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_installed_package_is_the_wheel(programs, tmp_path):
    code = "import sys, triderm_dist; print(triderm_dist.__file__, *sys.path)"
    first, *paths = output(programs, tmp_path, "python", "-c", code).split()
    assert first.startswith(str(programs.parent)) and str(ROOT) not in paths


def test_tasks_are_in_the_wheel(programs, tmp_path):
    code = (
        "from triderm_dist.tasks import load_task, task_names; print(*(load_task(name).name for name in task_names()))"
    )
    assert output(programs, tmp_path, "python", "-c", code).split() == list(task_names())


def test_light_programs_run_in_any_folder(programs, tmp_path):
    assert "Start here:" in output(programs, tmp_path, "triderm", "--help")
    assert output(programs, tmp_path, "triderm", "--version") == f"triderm-dist {__version__}\n"
    printed = output(programs, tmp_path, "triderm", "train", "--config", "demo", "--print-config")
    assert "output: runs/demo" in printed and "timm:test_efficientnet" in printed


def test_every_shipped_file_is_listed_and_can_be_copied(programs, tmp_path):
    listed = output(programs, tmp_path, "triderm", "config", "list")
    for kind in KINDS:
        for name in shipped_names(kind):
            assert re.search(rf"^  {re.escape(name)} +\S", listed, re.M), name
    assert output(programs, tmp_path, "triderm", "config", "copy", "rtx4090") == "rtx4090.yaml\n"
    printed = output(programs, tmp_path, "triderm", "train", "--config", "rtx4090.yaml", "--print-config")
    assert printed == output(programs, tmp_path, "triderm", "train", "--config", "rtx4090", "--print-config")
    output(programs, tmp_path, "triderm", "config", "copy", "slurm/train.sh")
    assert os.access(tmp_path / "train.sh", os.X_OK)
    assert Path(output(programs, tmp_path, "triderm", "config", "path", "slurm/common.sh").strip()).is_file()


@pytest.mark.slow
def test_doctor_reports_versions_and_finds_shipped_files(programs, tmp_path):
    done = run(programs, tmp_path, "triderm", "doctor", "--config", "demo", "launcher=ddp")
    assert done.returncode == 2 and done.stderr.startswith("error: a run cannot start: "), done.stdout + done.stderr
    assert "not tested with this version" not in done.stdout and "triderm pipeline --config" in done.stdout


@pytest.mark.slow
def test_accelerate_launches_programs_of_the_wheel(programs, tmp_path):
    launcher = output(programs, tmp_path, "triderm", "config", "path", "single").strip()
    words = ["accelerate.commands.launch", "--config_file", launcher, "-m", "triderm_dist.commands.train", "--help"]
    assert "Settings of this program:" in output(programs, tmp_path, "python", "-m", *words)


@pytest.mark.slow
def test_demo_runs_until_its_report(programs, tmp_path):
    output(programs, tmp_path, "triderm", "demo")
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
