"""Files that ship with the package and are found by name, as in `--config rtx4090`."""

from __future__ import annotations

import os
from pathlib import Path

from triderm_dist.files import expanded

SHIPPED = {
    "experiments": "launch/experiments",
    "spaces": "tune/spaces",
    "accelerate_configs": "accelerate_configs",
    "slurm": "launch/slurm",
    "kubernetes": "launch/kubernetes",
    "ray": "launch/ray",
    "tasks": "triderm_dist/tasks",
    "benchmarks": "benchmarks/results",
}
"""The folders of files that ship with the package, by kind, with their location in a clone."""
BY_STEM = ("experiments", "spaces", "accelerate_configs")
"""Kinds whose files a setting names without the ending: `--config rtx4090`, `space=losses`, `launcher=ddp`."""


def shipped(kind: str) -> Path:
    """Return the folder of a kind of `SHIPPED`: inside an installed wheel, else in the clone."""
    installed = Path(__file__).parents[1] / "shipped" / kind
    return installed if installed.is_dir() else Path(__file__).parents[2] / SHIPPED[kind]


def shipped_names(kind: str) -> list[str]:
    """Return the names of the files of a kind: `rtx4090` of an experiment, `slurm/train.sh` of a launcher."""
    if kind in BY_STEM:
        return sorted(path.stem for path in shipped(kind).glob("*.yaml"))
    return sorted(
        f"{kind}/{path.name}" for path in shipped(kind).iterdir() if path.is_file() and path.name != "__init__.py"
    )


def find_file(kind: str, name: str | os.PathLike[str]) -> Path:
    """Return the file at a path, or if there is none the shipped one of that name."""
    path = expanded(name)
    if not path.is_file() and str(name) in shipped_names(kind):
        return shipped(kind) / (f"{name}.yaml" if kind in BY_STEM else path.name)
    return path


def first_comment(file: Path) -> str:
    """Return the first comment line of a YAML file, a script or a Dockerfile: its one-line description."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "")
