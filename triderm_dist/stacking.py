"""The XGBoost stage: one multi-class booster on what means the same in every row of the out-of-fold table.

Logits, auxiliary logits, concepts and metadata do; fused features do not (each fold's network has its own axes), and
are not used. Shapes: N lesions, F columns, C diagnoses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from triderm_dist.calibration import log_probabilities
from triderm_dist.config import StackConfig
from triderm_dist.files import whole, write_json
from triderm_dist.oof import OofTable
from triderm_dist.schema import METADATA_FIELDS, DataError

FORMAT = "triderm-stacker"
VERSION = 1
NAME = "stack"
"""The stacker's name among the members of the ensemble."""

LEAST_LOG = -20.0
"""Log-probabilities are cut here: a tree can't use more, and infinities stay out of the columns."""

MAX_BIN = 64
"""Cuts a column. On a few thousand rows 256 cost twice the time and gained nothing."""

INNER_PARTS = 5
"""Early stopping watches one part in so many of the rows it is given."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stacker:
    """A fitted booster. `model` is its UBJ, `rounds` its trees a diagnosis; `absent` diagnoses had no row."""

    model: bytes
    feature_names: tuple[str, ...]
    diagnoses: tuple[str, ...]
    absent: tuple[str, ...]
    rounds: int
    device: str
    gain: dict[str, float]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(N, C) probabilities of (N, F) features, NaN for missing; an absent diagnosis has exactly 0."""
        xgboost = _xgboost()
        if features.shape[1] != len(self.feature_names):
            raise DataError(f"the stacker takes {len(self.feature_names)} columns, here are {features.shape[1]}")
        booster = xgboost.Booster({"device": "cpu"}, model_file=bytearray(self.model))
        scores = booster.inplace_predict(np.asarray(features, np.float32), validate_features=False)
        probabilities = np.asarray(scores, np.float64).reshape(len(features), len(self.diagnoses))
        probabilities[:, [name in self.absent for name in self.diagnoses]] = 0.0
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def save(self, path: Path) -> None:
        """Write the booster as UBJ and what else a reader needs as JSON beside it, each whole or not at all."""
        side = {
            "format": FORMAT,
            "version": VERSION,
            "feature_names": self.feature_names,
            "diagnoses": self.diagnoses,
            "absent": self.absent,
            "rounds": self.rounds,
            "device": self.device,
            "gain": self.gain,
        }
        with whole(path) as beside:
            beside.write_bytes(self.model)
        write_json(path.with_suffix(".json"), side)

    @staticmethod
    def load(path: Path) -> Stacker:
        """Read what `save` wrote. Raises DataError naming the file."""
        side_path = path.with_suffix(".json")
        try:
            model = path.read_bytes()
            side = json.loads(side_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: no such file; run launch.stack first") from None
        except ValueError:
            raise DataError(f"{side_path}: not readable as JSON; run launch.stack again") from None
        if (side.get("format"), side.get("version")) != (FORMAT, VERSION):
            raise DataError(f"{side_path}: not {FORMAT} version {VERSION}; run launch.stack again")
        return Stacker(
            model=model,
            feature_names=tuple(side["feature_names"]),
            diagnoses=tuple(side["diagnoses"]),
            absent=tuple(side["absent"]),
            rounds=side["rounds"],
            device=side["device"],
            gain=side["gain"],
        )


@dataclass(frozen=True)
class NestedStack:
    """Stacker probabilities that no row's own label has touched.

    out_of_fold: (N, C), row i by a stacker fitted on the folds other than i's.
    without: for each fold k (N, C): rows of k as in `out_of_fold`; a row of another fold j by a stacker that saw
    neither j nor k. On them weights and thresholds can be fitted and then judged on fold k.
    rounds: boosting rounds of the stacker of each fold.
    """

    out_of_fold: np.ndarray
    without: dict[int, np.ndarray]
    rounds: dict[int, int]


def stack_features(table: OofTable, models: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N, F) float32 columns and their names: log-probabilities of every head of every model, concepts, metadata."""
    columns: list[np.ndarray] = []
    names: list[str] = []
    for model in table.models if models is None else models:
        for part, logits in (
            ("logit", table.logits[model]),
            ("aux_clinical", table.aux_clinical[model]),
            ("aux_dermoscopic", table.aux_dermoscopic[model]),
        ):
            columns.append(np.maximum(log_probabilities(logits, table.heads[model]), LEAST_LOG))
            names += [f"{model}/{part}/{diagnosis}" for diagnosis in table.diagnoses]
    columns += [table.concepts, table.metadata]
    names += [f"concept/{name}" for name in table.concept_names] + [f"metadata/{name}" for name in METADATA_FIELDS]
    return np.concatenate(columns, axis=1).astype(np.float32), tuple(names)


def fit_stacker(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    feature_names: Sequence[str],
    diagnoses: Sequence[str],
    config: StackConfig,
    seed: int = 0,
    rounds: int | None = None,
) -> Stacker:
    """Fit on (N, F) features and (N,) labels, all labelled.

    With `rounds` None their number is found first: a booster on four fifths of the rows (whole groups, stratified)
    stops when the other fifth no longer gains. The stacker itself is fitted on all rows. Raises DataError where fewer
    than two diagnoses have rows.
    """
    absent = tuple(name for index, name in enumerate(diagnoses) if not (labels == index).any())
    if len(diagnoses) - len(absent) < 2:
        raise DataError("the stacker needs lesions of at least two diagnoses; set stack.enabled=false without them")
    device = device_of(config)
    weights = _row_weights(labels, len(diagnoses), config.class_weight_power)
    parameters = {
        "objective": "multi:softprob",
        "multi_strategy": "multi_output_tree" if config.booster == "multi_output" else "one_output_per_tree",
        "num_class": len(diagnoses),
        "tree_method": "hist",
        "device": device,
        "max_bin": MAX_BIN,
        "max_depth": config.max_depth,
        "learning_rate": config.learning_rate,
        "subsample": 0.8,
        "colsample_bytree": 0.5,
        "min_child_weight": 1.0,
        "reg_lambda": 2.0,
        "eval_metric": "mlogloss",
        "seed": seed,
        "verbosity": 0,
    }
    xgboost = _xgboost()

    def matrix(rows: np.ndarray, reference: Any = None) -> Any:
        return xgboost.QuantileDMatrix(
            features[rows],
            label=labels[rows],
            weight=weights[rows],
            feature_names=list(feature_names),
            missing=np.nan,
            max_bin=MAX_BIN,
            ref=reference,
        )

    every = np.arange(len(labels))
    if rounds is None:
        watch = split_parts(labels, groups, INNER_PARTS, seed) == 0
        train = matrix(every[~watch])
        booster = xgboost.train(
            parameters,
            train,
            config.max_rounds,
            evals=[(matrix(every[watch], train), "watch")],
            early_stopping_rounds=config.early_stopping,
            verbose_eval=False,
        )
        rounds = booster.best_iteration + 1
    booster = xgboost.train(parameters, matrix(every), rounds)
    return Stacker(
        model=bytes(booster.save_raw("ubj")),
        feature_names=tuple(feature_names),
        diagnoses=tuple(diagnoses),
        absent=absent,
        rounds=rounds,
        device=device,
        gain={name: float(value) for name, value in booster.get_score(importance_type="total_gain").items()},
    )


def nested_stack(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    folds: np.ndarray,
    feature_names: Sequence[str],
    diagnoses: Sequence[str],
    config: StackConfig,
    seed: int = 0,
) -> NestedStack:
    """Out-of-fold stacker probabilities, and for each fold those that know nothing of it. All rows labelled.

    A stacker without folds j and k serves both of them. The base networks of other folds did see fold k's labels: the
    usual second-order leak of stacking, which only retraining them would remove.
    """
    fitted: dict[bytes, Stacker] = {}

    def predict(train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        key = train.tobytes()
        if key not in fitted:
            fitted[key] = fit_stacker(
                features[train], labels[train], groups[train], feature_names, diagnoses, config, seed
            )
        return fitted[key].predict(features[rows])

    shape = (len(labels), len(diagnoses))
    out_of_fold, without, rounds = np.full(shape, np.nan), {}, {}
    for fold in np.unique(folds).tolist():
        others = folds != fold
        held = np.full(shape, np.nan)
        held[~others] = out_of_fold[~others] = predict(others, ~others)
        rounds[fold] = fitted[others.tobytes()].rounds
        parts = inner_folds(labels, groups, folds, others, seed)
        for part in np.unique(parts[others]).tolist():
            rows = others & (parts == part)
            held[rows] = predict(others & ~rows, rows)
        without[fold] = held
    return NestedStack(out_of_fold, without, rounds)


def inner_folds(labels: np.ndarray, groups: np.ndarray, folds: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """(N,) parts for fitting inside `rows` (N,) bool: their folds, or three stratified parts of the only one."""
    if len(np.unique(folds[rows])) > 1:
        return folds
    parts = np.full(len(labels), -1)
    parts[rows] = split_parts(labels[rows], groups[rows], 3, seed)
    return parts


def split_parts(labels: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """(N,) int64 in [0, parts): whole groups, each diagnosis spread as evenly as whole numbers allow.

    A group counts as one of its rarest diagnosis. Part 0 is served last, so that a diagnosis with fewer groups than
    parts is missing from part 0 first.
    """
    generator = np.random.default_rng(seed)
    frequency = np.bincount(labels)
    _, member = np.unique(groups.astype(str), return_inverse=True)
    key = np.full(member.max() + 1, -1, np.int64)
    for row in np.lexsort((-frequency[labels],)):  # the commonest first, so that the rarest stays
        key[member[row]] = labels[row]
    part = np.empty(len(key), np.int64)
    for label in np.unique(key):
        own = generator.permutation(np.flatnonzero(key == label))
        part[own] = parts - 1 - np.arange(len(own)) % parts
    return part[member]


def device_of(config: StackConfig) -> str:
    """The device XGBoost will really use: `cuda` falls back silently to the CPU without one, this does not.

    Raises DataError for device=cuda where there is no GPU or no GPU build.
    """
    if config.device == "cpu":
        return "cpu"
    import torch

    usable = bool(_xgboost().build_info().get("USE_CUDA")) and torch.cuda.is_available()
    if config.device == "cuda" and not usable:
        raise DataError("stack.device=cuda: there is no GPU, or this XGBoost was built without one; use auto or cpu")
    return "cuda" if usable else "cpu"


def in_own_process(config: StackConfig, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call here on a CPU; on a GPU in a child process, whose end gives back all of the GPU memory it took."""
    if device_of(config) == "cpu":
        return function(*arguments)
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _row_weights(labels: np.ndarray, classes: int, power: float) -> np.ndarray:
    """(N,) share of the row's diagnosis ** -power, scaled to mean 1."""
    share = np.maximum(np.bincount(labels, minlength=classes), 1) / len(labels)
    weights = (share**-power)[labels]
    return weights / weights.mean()


def _xgboost() -> Any:
    # Idle OpenMP threads that spin steal the cores of the ones at work: a fit took from 1.4 to 31 s, and 2 s with this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import xgboost

    return xgboost
