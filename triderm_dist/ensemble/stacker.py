"""The interface of a stacker: a classifier that combines the networks' out-of-fold predictions, concepts and metadata.

A new kind of stacker is a subclass of `Stacker` in the table `STACKERS` (fitted_stacker.py); docs/extending.md has a
recipe. Shapes: N rows of the columns, n rows to fit on or to predict, F columns, C diagnoses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from triderm_dist.ensemble.columns import Columns, batches_of
from triderm_dist.ensemble.sampling import draw_rows, shares_of
from triderm_dist.settings import Section


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The labeled rows that a stacker is fitted on: `indices` (n,) of `source` (N, F), ascending.

    labels: (n,) int64 in [0, C).  groups: (n,) text; rows of one group (a patient) belong together where rows are
    split.  names: of the columns.  diagnoses: C names.  wide: how many columns at the end belong to the block `extra`;
    `names` leaves them out. A stacker's `fit` always gets wide = 0: wide columns are reduced before.  weights: (n,)
    how many lesions each row stands for; None if the rows are no sample.
    """

    source: Columns
    indices: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    names: tuple[str, ...]
    diagnoses: tuple[str, ...]
    extra: str = ""
    wide: int = 0
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def width(self) -> int:
        """F, the number of columns."""
        return int(self.source.shape[1])

    @property
    def in_memory(self) -> bool:
        return isinstance(self.source, np.ndarray)

    def columns(self) -> np.ndarray:
        """Return (n, F) float32, NaN where missing. Reads all of them into memory."""
        batches = [np.asarray(batch, np.float32) for _, batch in self.batches()]
        return batches[0] if len(batches) == 1 else np.concatenate(batches)

    def batches(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (which of the n rows, their columns), in order: one batch in memory, several from a file."""
        first = 0
        for indices, batch in batches_of(self.source, self.indices):
            yield slice(first, first + len(indices)), batch
            first += len(indices)

    def take(self, mask: np.ndarray) -> TrainingRows:
        """Return the rows where `mask` (n,) is True."""
        return replace(
            self,
            indices=self.indices[mask],
            labels=self.labels[mask],
            groups=self.groups[mask],
            weights=None if self.weights is None else self.weights[mask],
        )

    def sample(self, most: int | None, seed: int) -> TrainingRows:
        """Return the rows, or if they are more than `most` a sample of them with their weights, in memory.

        Of each diagnosis it holds a number in proportion to the square root of that of its rows, or all: as many of the
        rare ones as a fit can use.
        """
        if most is None or len(self) <= most:
            return self
        counts = np.bincount(self.labels, minlength=len(self.diagnoses))
        chosen = draw_rows(self.labels, shares_of(counts, most), seed)
        taken = self.take(chosen)
        weights = (counts / np.maximum(np.bincount(taken.labels, minlength=len(counts)), 1))[taken.labels]
        return replace(taken, source=taken.columns(), indices=np.arange(len(taken)), weights=weights)


class Stacker(Protocol):
    """A fitted stacker of one kind. It sees F columns, with NaN where a value is missing.

    `FittedStacker` holds what does not depend on the kind: column names, wide columns, diagnoses without a row.
    """

    title: ClassVar[str]
    """Name in reports, such as XGBoost."""
    suffix: ClassVar[str]
    """Suffix of its file, RUN/stack + suffix; not .json or .safetensors, which are in use."""
    Settings: ClassVar[type[Section]]
    """Its own settings, `stack.settings` in YAML."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Import names of the optional packages that it needs to fit."""

    @classmethod
    @abstractmethod
    def fit(
        cls, rows: TrainingRows, settings: Any, *, seed: int, cores: int = 1, fold_stackers: Sequence[Any] = ()
    ) -> Self:
        """Fit on the rows, on at most `cores` threads, with the same result for the same seed.

        settings: an instance of `Settings`.  fold_stackers: stackers of each fold, where this one is fitted on all
        rows. What they learned from held-out rows, such as a number of rounds, can be reused.
        """

    @abstractmethod
    def predict(self, columns: np.ndarray) -> np.ndarray:
        """Return (n, C) probabilities; columns of diagnoses without a training row are ignored."""

    def needed(self) -> tuple[str, ...]:
        """Return the import names of the optional packages that it needs to predict."""
        return self.packages

    def contributions(self, columns: np.ndarray) -> np.ndarray | None:
        """Return (n, C, F): what each column adds to the score of each diagnosis before the softmax (SHAP values).

        With a constant per diagnosis they add up to the score. None if the kind has none.
        """
        return None

    @abstractmethod
    def save(self, path: Path) -> Mapping[str, Any]:
        """Write the model to `path`; return what else `load` needs, as JSON values for stack.json. No pickle."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path, description: Mapping[str, Any]) -> Self:
        """Read what `save` wrote; `description` is the content of stack.json."""

    @classmethod
    def parallel_fits(cls, settings: Any, rows: TrainingRows) -> int:
        """Return how many fits on most of the rows may run at the same time, in threads: 1 unless `fit` releases the
        GIL.
        """
        return 1

    def importance(self) -> tuple[str, dict[str, float]] | None:
        """Return the model's importance of columns, as (name of the measure, value by column name), if it has one.

        Otherwise the report shows the mean absolute contribution.
        """
        return None

    def summary(self) -> str:
        """Return one phrase for reports, such as "XGBoost, 23 rounds, on cpu"."""
        return self.title
