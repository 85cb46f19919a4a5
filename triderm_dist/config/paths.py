"""Paths among the settings of a run, written so that its folder may be moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from triderm_dist.config.experiment import Experiment
from triderm_dist.settings import NULL, describe

CONFIG_DIR = "${config_dir}"
"""At the start of a path in a YAML file: the folder of that file."""


def absolute_path(key: str, value: str) -> str:
    """Return the absolute form of a path setting; URLs, repositories and names of shipped tasks stay as they are."""
    shipped_task = key == "data.task" and not Path(value).exists()
    module = key == "plugins[]" and not value.endswith(".py")
    elsewhere = "://" in value or value.startswith(("pipe:", "hf-hub:"))
    return value if elsewhere or shipped_task or module else os.path.abspath(value)


def portable_path(file: Path, run: Path, key: str, value: str) -> str:
    path = absolute_path(key, value)
    if not Path(path).is_absolute() or not is_inside(Path(path), run):
        return path
    relative = os.path.relpath(path, os.path.abspath(file.parent))
    return CONFIG_DIR if relative == "." else f"{CONFIG_DIR}/{relative}"


def is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def map_paths(tree: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Apply `change(dotted key, path)` to every path among the settings of an experiment."""
    keys = {"plugins[]", *(key for key, kind, *_ in describe(Experiment) if kind.split()[0] == "path")}

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            names = {name: "NAME" if key == "models" else name for name in value}
            return {name: walk(each, f"{key}.{names[name]}" if key else str(name)) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [walk(each, f"{key}[]") for each in value]
        return change(key, str(value)) if key in keys and isinstance(value, str) and value not in NULL else value

    return {str(name): walk(each, str(name)) for name, each in tree.items()}


def with_config_dir(value: Any, folder: Path) -> Any:
    """Replace `${config_dir}` at the start of texts by the folder of their file."""
    if isinstance(value, Mapping):
        return {key: with_config_dir(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [with_config_dir(each, folder) for each in value]
    if not isinstance(value, str) or not f"{value}/".startswith(f"{CONFIG_DIR}/"):
        return value
    return os.path.normpath(os.path.join(folder, value.removeprefix(CONFIG_DIR).lstrip("/")))
