"""Performance on subgroups of lesions (slices): scores, gaps to the other lesions, and which gaps exceed the noise.

Shapes: N lesions, C diagnoses, n lesions of one side of a slice (inside or outside).

A score other than macro F1 is a sum over strata of lesions (such as those of one diagnosis) of the mean of a value of
each lesion: 0 or 1 for a found lesion, its placement among the lesions of other diagnoses for the area under the ROC
curve (DeLong, DeLong and Clarke-Pearson 1988). So its variance is the sum of variance / n over the strata. The variance
in a stratum is taken after adding four lesions with mean and variance of all lesions (for shares: Agresti and Caffo
2000), so that a few lesions which agree do not count as certain. Where lesions share a group, it is multiplied by the
design effect of the groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.intervals import Interval
from triderm_dist.intervals.interval import NORMAL
from triderm_dist.report.discrimination import malignant_share
from triderm_dist.schema import VIEWS, MetadataField, Task

MIN_SLICE_LESIONS = 100
"""A slice with fewer lesions, inside or outside, gets no verdict."""

MIN_SLICE_POSITIVES = 5
"""A diagnosis counts if at least this many lesions inside and outside the slice have it."""

LEVEL = 0.05
"""A gap with a smaller adjusted p-value is beyond the noise."""

ADDED_LESIONS = 4

BEYOND = "beyond the noise"
WITHIN = "within the noise"
TOO_SMALL = "too few lesions"

SCORES: dict[str, str] = {
    "macro_f1": "macro F1",
    "recall": "mean recall",
    "auc": "mean AUC",
    "sensitivity": "sensitivity for malignant lesions",
    "specificity": "specificity for benign lesions",
    "malignant_auc": "AUC, malignant against benign",
    "overconfidence": "overconfidence",
}
"""The scores of a slice by name. Overconfidence: mean largest probability minus accuracy of that diagnosis."""

GROUP = "lesions in a group"
"""In the place of a field's name (which has no space): whether a lesion's group, such as a patient, has others."""
PHOTOS, CONCEPTS = "photos of a lesion", "concepts of a lesion"
"""In the place of a field's name: which photos a lesion has, and whether concept scores are missing."""


@dataclass(frozen=True)
class ScoredLesions:
    """The lesions that are scored: probabilities (N, C), labels (N,), decisions (N, C) bool, groups (N,).

    malignant: (C,) 1 for malignant, 0 for benign, NaN for unknown.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    decisions: np.ndarray
    groups: np.ndarray
    malignant: np.ndarray


@dataclass(frozen=True)
class SliceScore:
    """A score of a slice, and its gap: the score inside minus that of all other lesions.

    lesions: inside.  p: of no gap, two-sided; adjusted: for all gaps that are judged. Both NaN where none is judged.
    """

    field: str
    value: str
    score_name: str
    lesions: int
    score: Interval
    gap: Interval
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """`BEYOND`, `WITHIN` or `TOO_SMALL`."""
        if np.isnan(self.adjusted):
            return TOO_SMALL
        return BEYOND if self.adjusted < LEVEL else WITHIN


def score_slices(lesions: ScoredLesions, slices: Mapping[str, Mapping[str, np.ndarray]]) -> list[SliceScore]:
    """Score the lesions inside and outside of each slice, and adjust the p-values of all gaps together.

    slices: (N,) bool of each value by field. Empty slices, and those of all lesions, are left out. The two values of a
    field without a third one are one comparison.
    """
    scored = _Scores(lesions)
    rows: list[SliceScore] = []
    judged: dict[tuple[bytes, str], list[int]] = {}
    for field, masks in slices.items():
        for value, mask in masks.items():
            size = int(mask.sum())
            if not 0 < size < len(mask):
                continue
            enough = min(size, len(mask) - size) >= MIN_SLICE_LESIONS
            key = np.packbits(mask if mask[0] else ~mask).tobytes()
            for name, (score, gap, p) in scored.of(mask).items():
                if enough and np.isfinite(p):
                    judged.setdefault((key, name), []).append(len(rows))
                rows.append(SliceScore(field, value, name, size, score, gap, p if enough else np.nan, np.nan))
    if not judged:
        return rows
    adjusted = intervals.holm(np.array([rows[same[0]].p for same in judged.values()]))
    values = {row: value for same, value in zip(judged.values(), adjusted, strict=True) for row in same}
    return [replace(each, adjusted=float(values.get(row, np.nan))) for row, each in enumerate(rows)]


def all_slice_masks(
    task: Task, metadata: np.ndarray, concepts: np.ndarray, groups: np.ndarray, photos: np.ndarray | None
) -> dict[str, dict[str, np.ndarray]]:
    """Return by metadata field the lesions (N,) bool of each value: ordinal fields first, numbers last.

    `PHOTOS`, `CONCEPTS` and `GROUP` follow, where lesions differ in them. metadata: (N, M).  concepts: (N, K).
    groups: (N,) numbers.  photos: (N, 2) bool, whether a lesion has each of `VIEWS`; None if that is not known.
    """
    values = dict(zip(task.field_names, metadata.T, strict=True))
    fields = sorted(task.fields, key=lambda field: ("ordinal", "category", "number").index(field.kind))
    masks = {field.name: slice_masks(field, values[field.name]) for field in fields}
    if photos is not None and not photos.all():
        has = {view.label: photos[:, VIEWS.index(view.name)] for view in task.views}
        masks[PHOTOS] = {f"without {title} photo": ~present for title, present in has.items()}
    missing = np.isnan(concepts).any(axis=1)
    if missing.any():
        masks[CONCEPTS] = {"complete": ~missing, "some missing": missing}
    sizes = np.bincount(groups)
    if sizes.max() > 1:
        single = sizes[groups] == 1
        masks[GROUP] = {"one": single, "several": ~single}
    return masks


def slice_masks(field: MetadataField, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the lesions (N,) bool of each category, or of each range of a number, and those with a missing value.

    values: (N,), NaN where missing. A number is divided at `field.cuts`, or at its quartiles.
    """
    missing = np.isnan(values)
    if not field.is_number:
        masks = {name: values == index for index, name in enumerate(field.categories)}
    elif missing.all():
        masks = {}
    else:
        cuts = [*(field.cuts or np.unique(np.quantile(values[~missing], (0.25, 0.5, 0.75))).tolist()), np.inf]
        masks = {f"under {cuts[0]:g}": values < cuts[0]}
        for low, high in pairwise(cuts):
            name = f"{low:g} and over" if high == np.inf else f"{low:g} to under {high:g}"
            masks[name] = (values >= low) & (values < high)
    return masks | {"missing": missing}


class _Scores:
    """Computes the scores of slices of the same lesions."""

    def __init__(self, lesions: ScoredLesions) -> None:
        self.lesions = lesions
        self.classes = lesions.probabilities.shape[1]
        self.every = np.arange(len(lesions.labels))
        self.codes = intervals.group_numbers(lesions.groups)
        self.grouped = bool((np.bincount(self.codes) > 1).any()) if len(self.codes) else False
        self.found = lesions.decisions[self.every, lesions.labels].astype(float)
        self.counts = np.bincount(lesions.labels, minlength=self.classes)
        shares = metrics.shares(lesions.probabilities)
        correct = lesions.probabilities.argmax(axis=1) == lesions.labels
        self.overconfidence = shares.max(axis=1) - correct
        # Ranks, in which ties are equal: placements are then counts of ranks.
        self.ranks = [_ranks(column) for column in lesions.probabilities.T]
        self._of_all: dict[int, tuple[np.ndarray, float]] = {}
        self.kind = lesions.malignant[lesions.labels]
        self.has_kinds = bool((self.kind == 0).any() and (self.kind == 1).any())
        if self.has_kinds:
            self.malignant_ranks = _ranks(malignant_share(lesions.probabilities, lesions.malignant))
            self.called = lesions.decisions[:, lesions.malignant == 1].any(axis=1).astype(float)

    def of(self, mask: np.ndarray) -> dict[str, tuple[Interval, Interval, float]]:
        """Return score, gap and p-value of each score that the slice (N,) bool has enough lesions for."""
        labels = self.lesions.labels
        inside = np.bincount(labels[mask], minlength=self.classes)
        kept = np.minimum(inside, self.counts - inside) >= MIN_SLICE_POSITIVES
        result = {}
        if kept.sum() >= 2:
            result["macro_f1"] = self._macro_f1(mask, kept)
            of_kept = kept[labels]
            result["recall"] = self._gap(mask, of_kept, labels, self.found / kept.sum())
            result["auc"] = self._auc(mask, self.every, labels, [self.ranks[c] for c in np.flatnonzero(kept)], kept)
        if self.has_kinds and all(
            np.minimum((self.kind[mask] == kind).sum(), (self.kind[~mask] == kind).sum()) >= MIN_SLICE_POSITIVES
            for kind in (0, 1)
        ):
            nothing = np.zeros_like(labels)
            result["sensitivity"] = self._gap(mask, self.kind == 1, nothing, self.called)
            result["specificity"] = self._gap(mask, self.kind == 0, nothing, 1 - self.called)
            known = np.flatnonzero(~np.isnan(self.kind))
            # One of two complementary diagnoses: benign has the same area.
            kinds, only = np.nan_to_num(self.kind).astype(np.int64), np.array([False, True])
            result["malignant_auc"] = self._auc(mask, known, kinds, [self.malignant_ranks], only)
        result["overconfidence"] = self._gap(
            mask, np.ones(len(mask), bool), np.zeros_like(labels), self.overconfidence, low=-1.0
        )
        return result

    def _macro_f1(self, mask: np.ndarray, kept: np.ndarray) -> tuple[Interval, Interval, float]:
        """The interval of the gap is from those of both sides (Zou and Donner 2008), the p-value from its width."""
        one, two = (
            intervals.macro_f1(
                self.lesions.decisions[side],
                self.lesions.labels[side],
                self.lesions.groups[side] if self.grouped else None,
                kept,
            )
            for side in (mask, ~mask)
        )
        gap = one.value - two.value
        below = float(np.hypot(one.value - one.low, two.high - two.value))
        above = float(np.hypot(one.high - one.value, two.value - two.low))
        return one, Interval(gap, gap - below, gap + above), _p_value(gap, (below if gap > 0 else above) / NORMAL)

    def _gap(
        self, mask: np.ndarray, used: np.ndarray, strata: np.ndarray, values: np.ndarray, low: float = 0.0
    ) -> tuple[Interval, Interval, float]:
        """Score and compare by the sum over strata of the mean of `values` (N,) of the `used` lesions (N,) bool."""
        pooled = _moments(strata[used], values[used], self.classes)
        sides = []
        for side in (mask & used, ~mask & used):
            codes = self.codes[side] if self.grouped else None
            sides.append(_score(strata[side], values[side], codes, pooled))
        return _compare(sides[0], sides[1], low)

    def _auc(
        self, mask: np.ndarray, used: np.ndarray, labels: np.ndarray, ranks: list[np.ndarray], kept: np.ndarray
    ) -> tuple[Interval, Interval, float]:
        """Compare by the mean area under the ROC curve of the kept diagnoses, each against all others.

        used: rows of the lesions that count.  labels: (N,).  ranks: (N,) of each kept diagnosis.
        """
        labels_used = labels[used]
        columns = np.flatnonzero(kept)
        everyone = [self._placements(rank, used, labels_used == c) for rank, c in zip(ranks, columns, strict=True)]
        sides = []
        for part in (mask[used], ~mask[used]):
            rows, own = used[part], labels_used[part]
            pooled = np.zeros(len(used))
            values = np.zeros(len(rows))
            sizes = np.bincount(own, minlength=len(kept))
            total = 0.0
            for c, rank, (all_values, all_area) in zip(columns, ranks, everyone, strict=True):
                placed, area = placements(rank[rows], own == c)
                total += area / len(columns)
                values += _share_of_sum(placed - area, own == c, sizes[c], len(own)) / len(columns)
                pooled += _share_of_sum(all_values - all_area, labels_used == c, sizes[c], len(own)) / len(columns)
            # A lesion's share of the sum, times the lesions of its diagnosis, is its value in the mean of its stratum.
            values *= sizes[own]
            pooled *= sizes[labels_used]
            moments = _moments(labels_used, pooled, len(kept))
            codes = self.codes[rows] if self.grouped else None
            sides.append((total, _score(own, values, codes, moments)[1]))
        return _compare(sides[0], sides[1], 0.0)

    def _placements(self, rank: np.ndarray, used: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, float]:
        """Return `placements` among all lesions, which every slice needs."""
        if id(rank) not in self._of_all:
            self._of_all[id(rank)] = placements(rank[used], positive)
        return self._of_all[id(rank)]


def placements(ranks: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the placement (n,) of each lesion, and their mean, the area under the ROC curve.

    The placement of a positive is the share of negatives with a smaller rank, that of a negative the share of positives
    with a larger one; ties count half. ranks: (n,) integers.  positive: (n,) bool. NaN without both kinds.
    """
    own, others = ranks[positive], ranks[~positive]
    size = int(ranks.max()) + 1
    positives, negatives = np.bincount(own, minlength=size), np.bincount(others, minlength=size)
    with np.errstate(invalid="ignore"):
        below = (np.cumsum(negatives) - negatives / 2) / len(others)
        above = (len(own) - np.cumsum(positives) + positives / 2) / len(own)
    placed = np.empty(len(ranks))
    placed[positive], placed[~positive] = below[own], above[others]
    return placed, float(placed[positive].mean()) if len(own) else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1].ravel()


def _share_of_sum(centered: np.ndarray, positive: np.ndarray, positives: int, lesions: int) -> np.ndarray:
    """Divide the centered placements by the number of lesions of their kind on the side."""
    return centered / np.where(positive, positives, lesions - positives)


def _moments(strata: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of the values of each stratum, 0 without a value."""
    counts = np.maximum(np.bincount(strata, minlength=size), 1)
    mean = np.bincount(strata, values, size) / counts
    return mean, np.bincount(strata, (values - mean[strata]) ** 2, size) / counts


def _score(
    strata: np.ndarray, values: np.ndarray, codes: np.ndarray | None, pooled: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    """Return the sum over strata of the mean value, and its variance. codes: of the groups, None for none."""
    size = len(pooled[0])
    counts = np.bincount(strata, minlength=size)
    mean, variance = _moments(strata, values, size)
    used = counts > 0
    total = counts + ADDED_LESIONS
    variance = (counts * variance + ADDED_LESIONS * pooled[1]) / total
    variance += counts * ADDED_LESIONS / total**2 * (mean - pooled[0]) ** 2
    if codes is not None:
        variance = variance * _design_effect(strata, values - mean[strata], codes, size)
    return float(mean[used].sum()), float((variance[used] / counts[used]).sum())


def _design_effect(strata: np.ndarray, residuals: np.ndarray, codes: np.ndarray, size: int) -> np.ndarray:
    """Return by stratum the variance over groups divided by that over independent lesions, at least 1.

    Where all values are equal it is unknown, and that of groups which agree throughout is taken.
    """
    pairs, inverse, lesions = np.unique(strata * (codes.max() + 1) + codes, return_inverse=True, return_counts=True)
    stratum = pairs // (codes.max() + 1)
    sums = np.bincount(inverse.ravel(), residuals)
    squares = np.bincount(strata, residuals**2, size)
    units = np.bincount(stratum, minlength=size)
    effect = metrics.ratio(np.bincount(stratum, sums**2, size) * units, squares * np.maximum(units - 1, 1))
    agreeing = metrics.ratio(
        np.bincount(stratum, lesions.astype(float) ** 2, size), np.bincount(strata, minlength=size)
    )
    return np.maximum(np.nan_to_num(np.where(squares > 1e-12, effect, agreeing), nan=1.0), 1.0)


def _compare(inside: tuple[float, float], outside: tuple[float, float], low: float) -> tuple[Interval, Interval, float]:
    """Return the score inside, the gap and its p-value, given value and variance of both sides."""
    half = NORMAL * np.sqrt(inside[1])
    score = Interval(inside[0], max(inside[0] - half, low), min(inside[0] + half, 1.0))
    gap, deviation = inside[0] - outside[0], float(np.sqrt(inside[1] + outside[1]))
    return score, Interval(gap, gap - NORMAL * deviation, gap + NORMAL * deviation), _p_value(gap, deviation)


def _p_value(gap: float, deviation: float) -> float:
    """Return the two-sided p-value of a normal gap with this standard deviation."""
    from scipy.special import ndtr

    if deviation == 0:
        return 1.0 if gap == 0 else float("nan")
    return float(2 * ndtr(-abs(gap) / deviation))
