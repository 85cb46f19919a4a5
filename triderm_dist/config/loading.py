"""Read settings from YAML files, saved runs and the command line."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from triderm_dist.config.experiment import Experiment, Extensible, RunReader
from triderm_dist.config.paths import map_paths, with_config_dir
from triderm_dist.config.saving import CONFIG_FILE, SAVED, SAVED_END
from triderm_dist.config.shipped_files import find_file
from triderm_dist.files import expanded, why_no_folder
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.plugins import IMPORTED, explain_plugin_error
from triderm_dist.runtime.redact import restore_urls
from triderm_dist.schema import ConfigError
from triderm_dist.settings import NULL, Plain, Section, Tree, merge, read_mapping, read_override, typed, validate

RunTree = TypeVar("RunTree", bound=Experiment)

_CUT_OFF = "its settings are cut off; restore it from a copy, or give the settings again: --config FILE output=RUN"


def load(kind: type[Tree], file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Tree:
    """Read the settings of `kind` from a YAML file and `key.subkey=value` overrides, which win.

    A file may name another one as `base: FILE` and change some of its settings. Raises ConfigError for a file that is
    missing or not a mapping, a key written twice, an unknown key (with the nearest known one), or a value of the wrong
    type.
    """
    top: dict[str, Any] = {}
    for override in overrides:
        top = merge(top, read_override(override))
    raw: dict[str, Any] = {}
    if issubclass(kind, Experiment) and "run" in top:
        if file is not None:
            raise ConfigError("run: takes the settings of that run; remove --config")
        raw = _settings_of_run(kind, top)
    elif file is not None:
        raw = read_yaml(path := find_file("experiments", file))
        if issubclass(kind, Experiment) and (folder := _run_folder(path, raw)):
            raw = _moved(raw, str(folder))
    return build(kind, merge(raw, top))


def load_run(kind: type[RunTree], folder: str | os.PathLike[str]) -> RunTree:
    """Read the settings of the run in a folder, as `run=FOLDER` does. Raises ConfigError."""
    top = {"run": os.fspath(folder)}
    return build(kind, merge(_settings_of_run(kind, top), top))


def build(kind: type[Tree], raw: Mapping[str, Any]) -> Tree:
    """Build the settings of `kind` from a nested mapping, after importing its plugins; URLs that were saved without
    their secrets are completed from `TRIDERM_URLS`. Raises ConfigError as `load` does, and for a plugin that cannot be
    imported.
    """
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        raise ConfigError(f"the class Settings of a plugin is no subclass of triderm_dist.settings.Section ({kind!r})")
    raw = restore_urls(raw)
    if issubclass(kind, Extensible):
        import_plugins(raw.get("plugins"))
    return validate(kind, raw)


def import_plugins(names: Any) -> None:
    """Import the files and modules of `plugins`, each once. Raises ConfigError for one that fails."""
    names = typed(names, Extensible.model_fields["plugins"].annotation)
    for name in names if isinstance(names, list | tuple) else ():
        path = expanded(str(name)).absolute()
        module = _plugin_module(path) if path.suffix == ".py" else str(name)
        IMPORTED[module] = str(name)
        if module in sys.modules:
            continue
        try:
            if path.suffix != ".py":
                importlib.import_module(module)
                continue
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None and spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        except (Exception, SystemExit) as error:  # a user's file may raise any type, or be a program
            text = explain_plugin_error(error) or f"{name}: {one_line(error, with_type=True)}"
            sys.modules.pop(module, None)
            raise ConfigError(f"plugins: {text}") from error


def _plugin_module(path: Path) -> str:
    """Return the name under which the file of a plugin is imported: files of two folders may have one name."""
    return f"triderm_plugin_{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the mapping in a file, laid over that of the file or shipped experiment that it names as `base`. That path
    is relative to the file's own folder, as is one that starts with `${config_dir}`.

    above: the files whose `base` led to this one, to detect a cycle.
    """
    if path.resolve() in above:
        cycle = " -> ".join(each.name for each in (*above[above.index(path.resolve()) :], path))
        raise ConfigError(f"{path}: `base` forms a cycle ({cycle}); remove one of them")
    raw = read_mapping(path, "--config takes a YAML file, or a name that `triderm config list` shows")
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines[:1] == [SAVED] and lines[-1] != SAVED_END:
        raise ConfigError(f"{path}: {_CUT_OFF}")
    raw = with_config_dir(raw, path.parent)
    base = raw.pop("base", None)
    if base is None or (isinstance(base, Plain) and base in NULL):
        return raw
    if not isinstance(base, str) or not base.isprintable():
        raise ConfigError(f"{path}: base: the name of one file or shipped experiment is expected (got {base!r:.80})")
    below = path.parent / expanded(base)
    return merge(read_yaml(below if below.is_file() else find_file("experiments", base), (*above, path.resolve())), raw)


def _settings_of_run(kind: type[Experiment], top: dict[str, Any]) -> dict[str, Any]:
    """Take `run` out of the settings of a command line, and return the settings of that run.

    Raises ConfigError if the folder holds none, and if `output` names another folder than `run` for a program
    that writes into its run.
    """
    folder = str(expanded(str(top.pop("run"))))
    file = Path(folder, CONFIG_FILE)
    if not file.is_file():
        raise ConfigError(f"run: {_why_no_run(Path(folder))}")
    raw = read_yaml(file)
    if not raw:
        raise ConfigError(f"{file}: {_CUT_OFF}")
    if (owner := _run_folder(file, raw)) not in (None, Path(folder)):
        raise ConfigError(f"run: {folder}: is the folder of a fold; name the run, {owner}")
    output = top.get("output")
    if issubclass(kind, RunReader):
        top["run"] = folder
    elif output is not None and os.path.abspath(os.path.expanduser(str(output))) != os.path.abspath(folder):
        raise ConfigError(
            f"output: run={folder} is worked on in its own folder; remove output, or start another run with the same "
            f"settings: --config {file} output={output}"
        )
    return _moved(raw, folder)


def _why_no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: {why_no_folder(folder)}"
    folds = sorted(folder.glob(f"*/fold-*/{CONFIG_FILE}"))
    advice = f"name a fold's settings instead: --config {folds[0]}" if folds else "name a folder that a run wrote"
    return f"{folder}: holds no {CONFIG_FILE}; {advice}"


def _run_folder(file: Path, raw: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run whose saved settings a file holds, None for a file that is not of a run."""
    models = raw.get("models")
    if file.name != CONFIG_FILE or not isinstance(models, Mapping) or "token_seed" not in raw:
        return None  # a saved file holds every setting
    folder = file.parent
    model = re.sub(r"-s\d+$", "", folder.absolute().parent.name)  # of a further seed, the name in the settings
    if {model, folder.absolute().parent.name} & set(models) and re.fullmatch(r"fold-\d+", folder.absolute().name):
        return Path(os.path.normpath(folder / ".." / ".."))
    of_a_run = (".lock", "stages.json", "oof.parquet", "ensemble.json", *map(str, models))
    return folder if any(folder.joinpath(name).exists() for name in of_a_run) else None


def _moved(raw: dict[str, Any], folder: str) -> dict[str, Any]:
    """Set `output` to a folder, and move the paths inside the former output there.

    Saved settings hold their own folder as `${config_dir}`; those of earlier versions hold what was typed.
    """
    former = str(raw.get("output", ""))

    def move(key: str, path: str) -> str:
        inside = former and path.startswith(f"{former.rstrip('/')}/")
        return os.path.join(folder, path[len(former.rstrip("/")) + 1 :]) if inside else path

    return {**map_paths(raw, move), "output": folder}
