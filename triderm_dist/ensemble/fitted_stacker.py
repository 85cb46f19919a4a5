"""The kinds of stackers, and the files of a fitted stacker of any kind.

Shapes: N rows, F columns as given, W of them wide, F' columns after the reduction of the wide ones, C diagnoses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from triderm_dist.checksums import DamagedFile, read_checked_tensors, write_checked_json, write_checked_tensors
from triderm_dist.config import StackConfig, build
from triderm_dist.ensemble.artifact import read_artifact
from triderm_dist.ensemble.columns import Columns, batches_of
from triderm_dist.ensemble.stacker import Stacker, TrainingRows
from triderm_dist.ensemble.xgboost_stacker import XGBoostStacker
from triderm_dist.files import file_sha256
from triderm_dist.runtime.extras import require
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import ConfigError, DataError, Task
from triderm_dist.schema.plugins import check_known, check_subclass, described
from triderm_dist.settings import Section
from triderm_dist.tasks import recorded_task

FORMAT = "triderm-stacker"
VERSION = 2

STACKERS: dict[str, type[Stacker]] = {"xgboost": XGBoostStacker}
"""Kinds of stackers, by the name in `stack.kind`. Plugins add theirs."""

SHARED_SETTINGS = ("enabled", "kind", "settings", "max_rows", "memory_gb", "extra", "components")
"""Keys of `stack` that every kind of stacker has; the others are XGBoost's."""


def stacker_kind(config: StackConfig) -> tuple[type[Stacker], Section]:
    """Return the class that `stack.kind` names and its settings.

    Raises ConfigError for an unknown kind, for settings that it does not have, and for settings of another kind;
    MissingPackage if it is enabled and a package that it needs is not installed.
    """
    check_known("stack.kind", config.kind, STACKERS, "a stacker")
    stacker = STACKERS[config.kind]
    check_subclass("stack.kind", config.kind, stacker, Stacker, "STACKERS")
    if stacker.suffix in (".json", ".safetensors"):
        raise ConfigError(
            f"stack.kind: {config.kind!r} has the suffix {stacker.suffix}, which is in use; choose another"
        )
    if isinstance(stacker.packages, str):
        raise ConfigError(f"stack.kind: packages of {config.kind!r} is a text; write ({stacker.packages!r},)")
    if config.enabled:
        packages = (*stacker.packages, "sklearn") if config.extra else stacker.packages
        require(f"stack.kind={config.kind}", *packages, instead="set stack.enabled=false")
    if stacker.Settings is StackConfig:
        if config.settings:
            raise ConfigError(
                f"stack.settings: {config.kind} has no settings there; write stack.max_depth=3, for example"
            )
        return stacker, config
    try:
        return stacker, build(stacker.Settings, config.settings)
    except ConfigError as error:
        raise ConfigError(f"stack.settings: {error}") from None


def ignored_settings(config: StackConfig) -> list[str]:
    """Return a note on each key of `stack` that was changed and has no effect: with a stacker of this kind, or
    without one.
    """
    used: tuple[str, ...]
    if not config.enabled:
        used, why = ("enabled",), "stack.enabled=false"
    elif STACKERS[config.kind].Settings is StackConfig:
        return []
    else:
        used, why = SHARED_SETTINGS, f"stack.kind={config.kind}"
    defaults = StackConfig()
    return [
        f"stack.{name} has no effect with {why}"
        for name in StackConfig.model_fields
        if name not in used and getattr(config, name) != getattr(defaults, name)
    ]


@dataclass(frozen=True, eq=False)
class Reduction:
    """Principal axes of the W wide columns at the end of a row. mean: (W,) and axes: (R, W) float32."""

    mean: np.ndarray
    axes: np.ndarray

    @staticmethod
    def fit(columns: np.ndarray, wide: int, components: int, seed: int) -> Reduction:
        """Fit on the rows (n, F) of one fit, without labels. R is `components`, or less where rows or W are fewer."""
        from sklearn.decomposition import PCA

        block = columns[:, -wide:]
        pca = PCA(min(components, *block.shape), svd_solver="randomized", random_state=seed % 2**32).fit(block)
        return Reduction(pca.mean_.astype(np.float32), np.ascontiguousarray(pca.components_, np.float32))

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """Reduce (n, F) to (n, F - W + R)."""
        wide = len(self.mean)
        return np.concatenate([columns[:, :-wide], (columns[:, -wide:] - self.mean) @ self.axes.T], axis=1)


class _StackerKeys(BaseModel):
    """Keys of stack.json of every kind; earlier versions had one kind, and no checksum of its file."""

    kind: str = "xgboost"
    feature_names: list[str]
    diagnoses: list[str]
    absent: list[str]
    extra: str
    model_sha256: str | None = None


@dataclass(frozen=True)
class FittedStacker:
    """A fitted stacker, with everything that does not depend on its kind.

    kind: its name in `STACKERS`.  model: the stacker itself.  feature_names: of the F' columns that it sees.
    absent: diagnoses without a training row.  extra: name of the wide columns, "" without.  reduction: of these.
    """

    kind: str
    model: Stacker
    feature_names: tuple[str, ...]
    diagnoses: tuple[str, ...]
    absent: tuple[str, ...]
    extra: str = ""
    reduction: Reduction | None = None

    @property
    def width(self) -> int:
        """F, the number of columns as given."""
        reduced = 0 if self.reduction is None else len(self.reduction.mean) - len(self.reduction.axes)
        return len(self.feature_names) + reduced

    def predict(self, columns: Columns, rows: np.ndarray | None = None) -> np.ndarray:
        """Return (n, C) probabilities of `rows` (ascending indices, None: all) of (N, F) columns.

        Absent diagnoses have exactly 0. Raises DataError for another number of columns, or where the model returns
        no probabilities.
        """
        rows = np.arange(len(columns)) if rows is None else rows
        probabilities = np.empty((len(rows), len(self.diagnoses)))
        done = 0
        for indices, batch in batches_of(columns, rows):
            part = np.asarray(self.model.predict(self.reduce(batch)))
            if part.shape != (expected := (len(indices), len(self.diagnoses))):
                raise DataError(f"the stacker {self.kind} predicted shape {part.shape}, not {expected}")
            if part.dtype.kind not in "fiub":
                raise DataError(f"the stacker {self.kind} predicted {part.dtype}, not numbers")
            probabilities[done : done + len(indices)] = part
            done += len(indices)
        probabilities[:, [name in self.absent for name in self.diagnoses]] = 0.0
        total = probabilities.sum(axis=1, keepdims=True)
        if not (probabilities >= 0).all() or not (total > 0).all():
            raise DataError(
                f"the stacker {self.kind} predicted probabilities that are negative, not finite, or all 0 for a lesion"
            )
        return probabilities / total

    def reduce(self, columns: np.ndarray) -> np.ndarray:
        """Return the (n, F') float32 columns that the model sees of (n, F). Raises DataError for another number."""
        if columns.shape[1] != self.width:
            raise DataError(f"the stacker was fitted on {self.width} columns, got {columns.shape[1]}")
        columns = np.asarray(columns, np.float32)
        return columns if self.reduction is None else self.reduction(columns)

    def save(self, path: Path, task: Task) -> None:
        """Write stack.json to `path`, and next to it the model and the reduction of wide columns, each atomically.

        task: what the columns and diagnoses mean.
        """
        remove_stacker(path)  # of an earlier fit
        model_file = model_path(path, type(self.model))
        description = self.model.save(model_file)
        if not isinstance(description, Mapping):
            raise ConfigError(
                f"stack.kind: save of {self.kind!r} returned {described(description)}, not a mapping of JSON values; "
                "return {} for none"
            )
        if self.reduction is not None:
            tensors = {"mean": self.reduction.mean, "axes": self.reduction.axes}
            write_checked_tensors(path.with_suffix(".safetensors"), tensors)
        shared = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "feature_names": self.feature_names,
            "diagnoses": self.diagnoses,
            "absent": self.absent,
            "extra": self.extra,
            "task": task.to_mapping(),
            "model_sha256": file_sha256(model_file) if model_file.is_file() else None,
        }
        write_checked_json(path, {**description, **shared})

    @staticmethod
    def load(path: Path, task: Task | None = None) -> FittedStacker:
        """Read what `save` wrote. task: that it must have been fitted for, None for any. Raises DataError naming the
        file, also for a kind that is not in `STACKERS`; MissingPackage if a package that it needs to predict is not
        installed.
        """
        description = read_artifact(path, FORMAT, VERSION, _StackerKeys)
        if task and not (own := recorded_task(description, str(path))).matches(task):
            raise DataError(
                f"{path}: was fitted for task {own.name!r}, not for {own.named_other(task)}; run triderm stack again"
            )
        kind = description.get("kind", "xgboost")  # earlier versions had this kind only
        if kind not in STACKERS:
            raise DataError(
                f"{path}: {kind!r} is not a stacker; known: {', '.join(STACKERS)}; name its file in `plugins`"
            )
        return FittedStacker(
            kind=kind,
            model=_load_model(path, kind, description),
            feature_names=tuple(description["feature_names"]),
            diagnoses=tuple(description["diagnoses"]),
            absent=tuple(description["absent"]),
            extra=description["extra"],
            reduction=_load_reduction(path.with_suffix(".safetensors")) if description["extra"] else None,
        )


def fit_stacker(
    rows: TrainingRows,
    config: StackConfig,
    seed: int = 0,
    cores: int = 1,
    fold_stackers: Sequence[FittedStacker] = (),
) -> FittedStacker:
    """Fit a stacker of `config.kind` on `config.max_rows` of the rows; wide columns are first reduced to
    `config.components` (in memory only).

    cores, fold_stackers: see `Stacker.fit`. Raises DataError if fewer than two diagnoses have rows.
    """
    kind, settings = stacker_kind(config)
    present = np.isin(np.arange(len(rows.diagnoses)), rows.labels)
    if present.sum() < 2:
        raise DataError("the stacker needs lesions of at least two diagnoses; set stack.enabled=false without them")
    rows = rows.sample(config.max_rows, seed)
    extra, reduction = rows.extra, None
    if rows.wide:
        columns = rows.columns()
        reduction = Reduction.fit(columns, rows.wide, config.components, seed)
        names = rows.names + tuple(f"{extra}/{number:02d}" for number in range(len(reduction.axes)))
        source, indices = reduction(columns), np.arange(len(rows))
        rows = replace(rows, source=source, indices=indices, names=names, extra="", wide=0)
    model = kind.fit(rows, settings, seed=seed, cores=cores, fold_stackers=[stacker.model for stacker in fold_stackers])
    if not isinstance(model, kind):
        raise ConfigError(f"stack.kind: fit of {config.kind!r} returned {type(model).__name__}, not a {kind.__name__}")
    return FittedStacker(
        kind=config.kind,
        model=model,
        feature_names=rows.names,
        diagnoses=rows.diagnoses,
        absent=tuple(name for name, known in zip(rows.diagnoses, present, strict=True) if not known),
        extra=extra,
        reduction=reduction,
    )


def _load_model(path: Path, kind: str, description: Mapping[str, Any]) -> Stacker:
    """Read the model of a stacker of this kind that `path` (stack.json) describes; see `FittedStacker.load`."""
    model_file, expected = model_path(path, STACKERS[kind]), description.get("model_sha256")
    try:
        if expected and file_sha256(model_file) != expected:
            raise DataError(f"{model_file}: changed or damaged: not that of {path.name}; run triderm stack again")
        model = STACKERS[kind].load(model_file, description)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such file; run triderm stack first") from None
    except OSError as error:
        raise DataError(f"{model_file}: not readable ({error.strerror or error}); run triderm stack again") from None
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; run triderm stack again") from None
    except (KeyError, TypeError, ValueError) as error:
        text = one_line(error, with_type=True)
        raise DataError(f"{path}: changed or damaged ({text}); run triderm stack again") from None
    if not isinstance(model, STACKERS[kind]):
        raise ConfigError(f"stack.kind: load of {kind!r} returned {described(model)}, not the stacker")
    try:
        packages = model.needed()
    except DataError as error:  # damaged, and of a version that recorded no checksum
        raise DataError(f"{model_file}: {error}; run triderm stack again") from None
    require(f"{path}: the stacker ({kind})", *packages)
    return model


def model_path(path: Path, kind: type[Stacker]) -> Path:
    """Return the path of the model of a stacker described in `path` (stack.json)."""
    return path.with_name(path.stem + kind.suffix)


def remove_stacker(path: Path) -> None:
    """Remove the files of a stacker of any kind, if there are any. path: its stack.json."""
    for file in (path, path.with_suffix(".safetensors"), *(model_path(path, kind) for kind in STACKERS.values())):
        file.unlink(missing_ok=True)


def _load_reduction(path: Path) -> Reduction:
    try:
        return Reduction(**read_checked_tensors(path))
    except (OSError, DamagedFile, TypeError):
        raise DataError(f"{path}: missing, changed or damaged; run triderm stack again") from None
