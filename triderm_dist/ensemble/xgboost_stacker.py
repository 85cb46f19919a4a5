"""The XGBoost stacker: one multi-class booster with early stopping, in memory or in XGBoost's external memory.

Shapes: n rows, F columns, C diagnoses.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel

from triderm_dist.checksums import check_mapping
from triderm_dist.config import StackConfig
from triderm_dist.data.folds import split_parts
from triderm_dist.data.threads import openmp_threads
from triderm_dist.ensemble.boosted_trees import BoostedTrees
from triderm_dist.ensemble.stacker import Stacker, TrainingRows
from triderm_dist.ensemble.stacker_process import set_passive_openmp
from triderm_dist.files import atomic_path
from triderm_dist.runtime.extras import is_installed
from triderm_dist.schema import DataError

MAX_BIN = 64
"""Histogram bins per column. On a few thousand rows 256 took twice the time and gained nothing."""

EARLY_STOPPING_PARTS = 5
"""Early stopping validates on one of this many parts of the rows."""

NUMPY_CELLS = 20_000_000
"""Rows times trees up to which NumPy predicts, in a second; importing XGBoost takes as long."""

CELLS_PER_THREAD = 4_000_000
"""Cells (rows x columns) per thread of a fit. With fewer, a second thread saves a tenth of the time on an idle machine
(benchmarks.stack) and costs several times as much on a busy one; and single-threaded fits are bit-identical on any
number of cores."""


GPU_CELLS = 20_000_000
"""Cells from which device=auto takes a GPU. A fit is hundreds of rounds of small trees: below, a GPU waits for its
launches (estimated; `benchmarks.gpu part=4` measures it), and takes one fit at a time, a CPU one per core."""


class _Keys(BaseModel):
    """Keys of stack.json that this kind of stacker adds."""

    rounds: int
    device: str
    gain: dict[str, float]


@dataclass(frozen=True)
class XGBoostStacker(Stacker):
    """A fitted booster.

    model: its UBJ.  rounds: boosting rounds.  device: where it was fitted.  gain: total gain by column name.
    """

    title: ClassVar[str] = "XGBoost"
    suffix: ClassVar[str] = ".ubj"
    Settings: ClassVar[type[StackConfig]] = StackConfig
    packages: ClassVar[tuple[str, ...]] = ("xgboost",)

    model: bytes
    rounds: int
    device: str
    gain: dict[str, float]

    @classmethod
    def fit(
        cls,
        rows: TrainingRows,
        settings: StackConfig,
        *,
        seed: int,
        cores: int = 1,
        fold_stackers: Sequence[XGBoostStacker] = (),
    ) -> XGBoostStacker:
        """Fit on all of the rows, with the median number of rounds of `fold_stackers`.

        Without them, the number is found first: a booster on four fifths of the rows (groups kept together, stratified)
        stops when the other fifth no longer improves. Raises DataError if the device does not exist.
        """
        device = device_of(settings, len(rows) * rows.width, rows.in_memory)
        threads = threads_for(len(rows), rows.width, cores)
        weights = _row_weights(rows, settings.class_weight_power)
        parameters = {
            "objective": "multi:softprob",
            "multi_strategy": "multi_output_tree" if settings.booster == "multi_output" else "one_output_per_tree",
            "num_class": len(rows.diagnoses),
            "tree_method": "hist",
            "device": device,
            "nthread": threads,
            "max_bin": MAX_BIN,
            "max_depth": settings.max_depth,
            "learning_rate": settings.learning_rate,
            "subsample": settings.subsample,
            "colsample_bytree": settings.colsample_bytree,
            "min_child_weight": settings.min_child_weight,
            "reg_lambda": settings.reg_lambda,
            "eval_metric": "mlogloss",
            "seed": seed,
            "verbosity": 0,
        }
        with TemporaryDirectory(prefix="triderm-stack-") as cache:
            # References to matrices must be gone before the folder: they hold its files open.
            if fold_stackers:
                rounds = int(np.median([each.rounds for each in fold_stackers]))
            else:
                rounds = _best_rounds(rows, weights, parameters, settings, seed, Path(cache))
            matrix = _matrix(rows, weights, threads, Path(cache))
            booster = import_xgboost().train(parameters, matrix, rounds)
            del matrix
            model = bytes(booster.save_raw("ubj"))
            gain = booster.get_score(importance_type="total_gain")
            del booster
        column_of = dict(zip(_names(rows), rows.names, strict=True))
        return cls(model, rounds, device, {column_of[name]: float(value) for name, value in gain.items()})

    def predict(self, columns: np.ndarray) -> np.ndarray:
        """Predict without XGBoost where that is quick, to the same numbers up to 1e-7."""
        trees = self._trees
        if trees and (len(columns) * len(trees.first) <= NUMPY_CELLS or not is_installed("xgboost")):
            return trees.predict(columns)
        scores = self._booster().inplace_predict(columns, validate_features=False)
        return np.reshape(scores, (len(columns), -1))

    def contributions(self, columns: np.ndarray) -> np.ndarray | None:
        """Return TreeSHAP values (Lundberg et al. 2020).

        None without XGBoost, and for multi-output trees with a version that has none for them (before 3.4).
        """
        if not is_installed("xgboost"):
            return None
        xgboost = import_xgboost()
        matrix = xgboost.DMatrix(columns, missing=np.nan)
        try:
            values = self._booster().predict(matrix, pred_contribs=True, validate_features=False)
        except xgboost.core.XGBoostError:
            return None
        return np.asarray(values)[:, :, :-1]

    def importance(self) -> tuple[str, dict[str, float]]:
        return "total gain", self.gain

    def summary(self) -> str:
        return f"{self.title}, {self.rounds} rounds, on {self.device}"

    def save(self, path: Path) -> Mapping[str, Any]:
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.model)
        return {"rounds": self.rounds, "device": self.device, "gain": self.gain}

    @classmethod
    def load(cls, path: Path, description: Mapping[str, Any]) -> XGBoostStacker:
        check_mapping(description, _Keys)
        return cls(path.read_bytes(), description["rounds"], description["device"], description["gain"])

    @classmethod
    def parallel_fits(cls, settings: StackConfig, rows: TrainingRows) -> int:
        """Return 1 on a GPU; on a CPU one per core, since most fits are small and XGBoost releases the GIL."""
        fitted = min(len(rows), settings.max_rows or len(rows))
        device = device_of(settings, fitted * rows.width, rows.in_memory or fitted < len(rows))
        return 1 if device == "cuda" else openmp_threads()

    def needed(self) -> tuple[str, ...]:
        return () if self._trees else self.packages

    @cached_property
    def _trees(self) -> BoostedTrees | None:
        return BoostedTrees.read(self.model)

    def _booster(self) -> Any:
        xgboost = import_xgboost()
        try:
            return xgboost.Booster({"device": "cpu", "nthread": 1}, model_file=bytearray(self.model))
        except xgboost.core.XGBoostError as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"not a model of this XGBoost ({reason}); run triderm stack again") from None


def device_of(config: StackConfig, cells: int, in_memory: bool = True) -> str:
    """Return the device that XGBoost will use for a fit; XGBoost itself falls back silently from `cuda` to the CPU.

    cells: rows x columns.  in_memory: auto streams columns from a file on the CPU, as they lie in the memory of the
    host. Raises DataError for device=cuda without a GPU or a GPU build.
    """
    if config.device == "cpu" or (config.device == "auto" and (cells < GPU_CELLS or not in_memory)):
        return "cpu"
    usable = bool(import_xgboost().build_info().get("USE_CUDA")) and count_gpus() > 0
    if config.device == "cuda" and not usable:
        raise DataError(
            "stack.device=cuda: there is no GPU, or this XGBoost was built without CUDA; set stack.device=auto or cpu"
        )
    return "cuda" if usable else "cpu"


def count_gpus() -> int:
    """Count the GPUs of this process by asking the driver, without opening a context or importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def threads_for(rows: int, columns: int, cores: int) -> int:
    """Return the threads of one fit: one per `CELLS_PER_THREAD`, at least 1 and at most `cores`."""
    return max(1, min(cores, rows * columns // CELLS_PER_THREAD))


def import_xgboost_alone() -> None:
    """Import xgboost without scikit-learn, which takes a second, and without its estimators in this process.

    Does nothing if one of them is imported already, or xgboost is not installed.
    """
    if {"sklearn", "xgboost"} & set(sys.modules):
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # an ImportError for who imports it
    try:
        with contextlib.suppress(ImportError):
            import_xgboost()
    finally:
        del sys.modules["sklearn"]


def import_xgboost() -> Any:
    """Import XGBoost, which takes a second, when it is first needed."""
    set_passive_openmp()
    import xgboost

    return xgboost


def _best_rounds(
    rows: TrainingRows,
    weights: np.ndarray,
    parameters: Mapping[str, Any],
    settings: StackConfig,
    seed: int,
    cache: Path,
) -> int:
    """Find the number of rounds by early stopping on a part of the rows; 1 where each diagnosis has a single group."""
    parts = split_parts(rows.labels, rows.groups, EARLY_STOPPING_PARTS, seed)
    held_out = parts == parts.min()  # part 0 is empty where every diagnosis has fewer groups than there are parts
    if held_out.all():
        return 1
    train = _matrix(rows.take(~held_out), weights[~held_out], parameters["nthread"], cache)
    validation = _matrix(rows.take(held_out), weights[held_out], parameters["nthread"], cache, reference=train)
    booster = import_xgboost().train(
        parameters,
        train,
        settings.max_rounds,
        evals=[(validation, "validation")],
        early_stopping_rounds=settings.early_stopping,
        verbose_eval=False,
    )
    return int(booster.best_iteration) + 1


def _matrix(rows: TrainingRows, weights: np.ndarray, threads: int, cache: Path, reference: Any = None) -> Any:
    """Quantize the rows: at once in memory, or in pages on disk where the columns are in a file.

    reference: a matrix whose bins are used.
    """
    xgboost = import_xgboost()
    names = _names(rows)
    shared = {"missing": np.nan, "max_bin": MAX_BIN, "nthread": threads, "ref": reference}
    if rows.in_memory:
        return xgboost.QuantileDMatrix(rows.columns(), label=rows.labels, weight=weights, feature_names=names, **shared)

    # Only the cycle collector frees this class, after the folder is gone: it must not refer to a matrix.
    prefix = str(cache / f"{'train' if reference is None else 'validation'}-{len(rows)}")

    class Batches(xgboost.DataIter):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.batches = rows.batches()
            super().__init__(cache_prefix=prefix)

        def next(self, input_data: Callable[..., None]) -> bool:
            batch = next(self.batches, None)
            if batch is not None:
                part, values = batch
                input_data(data=values, label=rows.labels[part], weight=weights[part], feature_names=names)
            return batch is not None

        def reset(self) -> None:
            self.batches = rows.batches()

    return xgboost.ExtMemQuantileDMatrix(Batches(), **shared)


def _names(rows: TrainingRows) -> list[str]:
    """Return names of the columns that XGBoost accepts: those with a character that it refuses get a number instead."""
    return [f"column {number}" if set(name) & set("[]<") else name for number, name in enumerate(rows.names)]


def _row_weights(rows: TrainingRows, power: float) -> np.ndarray:
    """Return (n,) weights, share of the row's diagnosis ** -power by the lesions that it stands for, with mean 1."""
    lesions = np.bincount(rows.labels, rows.weights, len(rows.diagnoses))
    share = np.maximum(lesions, 1) / lesions.sum()
    weights = (share**-power)[rows.labels]
    if rows.weights is not None:
        weights *= rows.weights
    return weights / weights.mean()
