"""The settings of a run as YAML."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from triderm_dist.config.experiment import Experiment
from triderm_dist.config.paths import is_inside, map_paths, portable_path
from triderm_dist.files import write_text
from triderm_dist.runtime.redact import redact_tree
from triderm_dist.settings import Section, to_yaml

CONFIG_FILE = "config.yaml"
"""The resolved settings of a run, in its folder; of a fold trained by itself also in the fold's folder."""
SAVED, SAVED_END = "# All settings of a run.", "# End of the settings."
"""The first and last line of a file of saved settings: a part of such a file may be valid YAML as well."""


def as_yaml(config: Section) -> str:
    """Return the resolved settings as YAML that `load` reads back to an equal tree, but for passwords and tokens."""
    return to_yaml(_tree(config))


def _tree(config: Section) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    if isinstance(config, Experiment):
        tree["models"] = {name: model for name, model in tree["models"].items() if config.models[name].seeds}
        # Only what differs from the shared settings, so that overriding `train` of a saved file still has effect.
        for model in tree["models"].values():
            model["train"] = _difference(model["train"], tree["train"])
    return redact_tree(tree)


def save(config: Section, path: Path) -> None:
    """Write the resolved settings as YAML, without passwords and tokens (`redact_tree`).

    In a file inside the run's own folder, a path into that folder is written relative to the file, and any other one
    absolute, so that the folder may be moved and used from any working directory.
    """
    tree = _tree(config)
    if isinstance(config, Experiment) and is_inside(path, config.folder):
        tree = map_paths({**tree, "output": str(config.folder)}, partial(portable_path, path, config.folder))
    write_text(path, f"{SAVED}\n{to_yaml(tree)}{SAVED_END}\n")


def _difference(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `tree` that differs from `base`."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in base or value != base[key]:
            below = base.get(key)
            result[key] = _difference(value, below) if isinstance(value, dict) and isinstance(below, dict) else value
    return result
