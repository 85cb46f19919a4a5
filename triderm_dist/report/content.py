"""What the report says, as numbers: read from a run's folder and worked out, before any of it is drawn or written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from triderm_dist import metrics
from triderm_dist.ensemble.artifact import Ensemble, read_json
from triderm_dist.ensemble.predict import check_weights
from triderm_dist.ensemble.run_files import (
    ENSEMBLE_FILE,
    HELD_OUT_FILE,
    NESTED_FILE,
    OOF_FILE,
    STACK_FILE,
    TURNS_FILE,
    read_nested,
)
from triderm_dist.ensemble.stack_inputs import stacker_columns
from triderm_dist.ensemble.stacker import STACKER, Stacker
from triderm_dist.predictions import read_oof, read_predictions
from triderm_dist.schema import METADATA_FIELDS, VIEWS, DataError, MetadataField

SMALL_SLICE = 100
"""A slice with fewer lesions is too small to tell."""

FALLS_BEHIND = "falls behind"

SHAP_LESIONS = 1000
"""SHAP values are worked out for so many lesions at most."""

LEAST_IN_SLICE = 5
"""A diagnosis counts in a slice, and outside it, from this many lesions on."""

OTHERS: tuple[tuple[str, str, str], ...] = (
    ("leaderboard top, method unknown (164 entries, median 0.471)", "", "0.705"),
    ("best without external data", "", "0.609"),
    ("two-model ensemble, ConvNeXt-Tiny, 5 folds", "0.544 nested (0.580 pooled)", ""),
    ("ConvNeXt-Tiny at 384, dermoscopy only, 5 folds", "0.533 nested (0.564 tuned)", ""),
    ("tri-modal PanDerm/DermLIP, one split", "0.539", "0.486"),
    ("PanDerm ViT-L with graph attention, 5 folds", "0.541", "0.478"),
    ("EfficientNetV2-S, MONET, test-time augmentation", "0.443", "0.422"),
    ("first try: logistic regression on frozen ImageNet features, metadata and MONET scores", "0.409 nested", ""),
)
"""What others say they reached on MILK10k: who, on their own validation, on the official test set (macro F1)."""


@dataclass(frozen=True)
class Slice:
    """How the decisions fare on the lesions of one value of a metadata field.

    macro_f1 and behind use only diagnoses with `LEAST_IN_SLICE` lesions inside and outside. behind: mean recall here
    less that of all other lesions (recall, since F1 also moves with how common a diagnosis is); None with nothing to
    compare.
    """

    field: str
    value: str
    lesions: int
    diagnoses: int
    macro_f1: metrics.Interval | None
    behind: metrics.Interval | None

    @property
    def warning(self) -> str:
        if self.behind is None or self.lesions < SMALL_SLICE:
            return "too small to tell"
        return FALLS_BEHIND if self.behind.high < 0 else ""


@dataclass(frozen=True)
class OnePhoto:
    """Macro F1 (argmax) of a network on lesions whose `missing` view is hidden from it, and that less its own."""

    model: str
    missing: str
    macro_f1: float
    difference: metrics.Interval


@dataclass(frozen=True)
class Hard:
    """A lesion whose diagnosis the ensemble finds unlikely. agree: how many of the networks believe the same."""

    lesion_id: str
    label: str
    believed: str
    of_label: float
    of_believed: float
    claimed: str
    agree: int


@dataclass(frozen=True)
class Shap:
    """SHAP values of the stacker: (N, C, F) of N lesions, the values of their columns (N, F), and the F names."""

    values: np.ndarray
    columns: np.ndarray
    names: tuple[str, ...]


class Content:
    """Everything the page shows, each part worked out once, when it is asked for.

    Raises DataError where ensemble.json, ensemble_oof.parquet or oof.parquet is missing or does not belong together.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = Path(run_folder)
        self.fitted = Ensemble.load(self.folder / ENSEMBLE_FILE)
        self.about = read_json(self.folder / ENSEMBLE_FILE)
        self.rows = read_nested(self.folder / NESTED_FILE)
        table = read_oof(self.folder / OOF_FILE, features=(self.folder / TURNS_FILE).exists())
        check_weights(self.folder, table.hashes.items())
        place = {lesion: row for row, lesion in enumerate(table.lesion_ids)}
        if any(lesion not in place for lesion in self.rows.lesion_ids):
            raise DataError(f"{self.folder / NESTED_FILE}: holds lesions that oof.parquet lacks; run triderm stack")
        self.table = table.take(np.array([place[lesion] for lesion in self.rows.lesion_ids]))
        self.diagnoses = self.fitted.diagnoses
        self.resamples = int(self.about["bootstrap"])

    @property
    def labels(self) -> np.ndarray:
        return self.rows.labels

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def score(self) -> metrics.Interval:
        return metrics.Interval(**self.about["scores"]["ensemble"]["nested"])

    @cached_property
    def held_out(self) -> dict[str, Any] | None:
        path = self.folder / HELD_OUT_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @cached_property
    def settings(self) -> str:
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @cached_property
    def synthetic(self) -> bool:
        """Whether the data say of themselves that they were drawn, not photographed."""
        source = ((yaml.safe_load(self.settings) or {}).get("data") or {}).get("source") if self.settings else None
        if not source:
            return False
        places = (Path(source) / "attribution.txt", Path(source).parent / "README.txt")
        return any(path.exists() and path.read_text(encoding="utf-8").startswith("SYNTHETIC") for path in places)

    @cached_property
    def counts(self) -> metrics.ClassCounts:
        return metrics.class_counts(self.rows.decisions, self.labels)

    @cached_property
    def class_intervals(self) -> list[metrics.Interval]:
        draws = metrics.bootstrap_f1(self.rows.decisions, self.labels, self.resamples)
        return [metrics.interval_of(value, draws[:, column]) for column, value in enumerate(self.counts.f1)]

    @cached_property
    def confusion(self) -> np.ndarray:
        """(C, C + 1) lesions of each diagnosis (row) by what was claimed; the last column: nothing was.

        A lesion with several claims counts in each of their columns.
        """
        size = len(self.diagnoses)
        result = np.zeros((size, size + 1), np.int64)
        for label in range(size):
            own = self.rows.decisions[self.labels == label]
            result[label, :size] = own.sum(axis=0)
            result[label, size] = (~own.any(axis=1)).sum()
        return result

    @cached_property
    def curves(self) -> dict[str, dict[int, list[dict[str, Any]]]]:
        """Records of metrics.jsonl by model and fold; a last line that a kill cut short is left out."""
        result: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for model in self.table.models:
            for path in sorted((self.folder / model).glob("fold-*/metrics.jsonl")):
                records = []
                for line in path.read_text(encoding="utf-8").splitlines():
                    try:
                        records.append(json.loads(line))
                    except json.JSONDecodeError:
                        break
                if records:
                    result.setdefault(model, {})[int(path.parent.name.removeprefix("fold-"))] = records
        return result

    @cached_property
    def importance(self) -> dict[str, float]:
        """Share of the stacker's total gain by column, largest first; empty without a stacker."""
        path = (self.folder / STACK_FILE).with_suffix(".json")
        if not path.exists():
            return {}
        gain = json.loads(path.read_text(encoding="utf-8"))["gain"]
        whole = sum(gain.values()) or 1.0
        return {name: value / whole for name, value in sorted(gain.items(), key=lambda item: -item[1])}

    @cached_property
    def shap(self) -> Shap | None:
        """Of the stacker that predicts the test set, on some of the lesions; None without a stacker, or for one of
        multi-output trees.
        """
        path = self.folder / STACK_FILE
        if not path.exists():
            return None
        stacker = Stacker.load(path)
        rows = np.sort(np.random.default_rng(0).permutation(len(self.table))[:SHAP_LESIONS])
        columns = stacker_columns(self.folder, stacker.extra, self.table.take(rows), self.networks)
        values = stacker.contributions(columns)
        return None if values is None else Shap(values, stacker.seen(columns), stacker.feature_names)

    @property
    def networks(self) -> tuple[str, ...]:
        """The members that are networks."""
        return tuple(name for name in self.fitted.members if name != STACKER)

    @cached_property
    def slices(self) -> list[Slice]:
        result = []
        for field, values in self._slice_masks().items():
            for value, mask in values.items():
                if mask.any():
                    result.append(self._slice(field, value, mask))
        return result

    @cached_property
    def one_photo(self) -> list[OnePhoto]:
        """What each network loses without a view; nothing of networks that do not look at both."""
        result = []
        for model in self.networks:
            full = metrics.argmax_decisions(self.table.logits[model])
            for view in VIEWS:
                logits = np.full_like(self.table.logits[model], np.nan)
                place = {lesion: row for row, lesion in enumerate(self.table.lesion_ids)}
                for path in sorted((self.folder / model).glob(f"fold-*/without_{view}.parquet")):
                    part = read_predictions(path)
                    rows = [(place[lesion], i) for i, lesion in enumerate(part.lesion_ids) if lesion in place]
                    for row, i in rows:
                        if part.model_hash[i] == self.table.hashes[model][row]:  # not of an earlier training
                            logits[row] = part.logits[i]
                if np.isnan(logits).any():
                    continue
                seen = metrics.argmax_decisions(logits)
                difference = metrics.paired_difference(seen, full, self.labels, self.resamples)
                result.append(OnePhoto(model, view, metrics.macro_f1(seen, self.labels), difference))
        return result

    @cached_property
    def hardest(self) -> list[Hard]:
        """The 20 lesions whose diagnosis the ensemble gives the least of their total probability."""
        of_label = self._share[np.arange(len(self.labels)), self.labels]
        return [self._hard(row, int(self._share[row].argmax())) for row in np.argsort(of_label, kind="stable")[:20]]

    @cached_property
    def mislabeled(self) -> list[Hard]:
        """Lesions whose label is likely wrong, the likeliest first, by confident learning (Northcutt et al. 2021).

        Another diagnosis is at least as probable as among its own lesions on average, the label less than among its
        own, and every network by itself thinks that other one the likeliest. Ordered by how much the one outdoes the
        other.
        """
        share, every = self._share, np.arange(len(self.labels))
        present = np.isin(np.arange(len(self.diagnoses)), self.labels)
        usual = np.full(len(self.diagnoses), np.inf)
        usual[present] = [share[self.labels == label, label].mean() for label in np.flatnonzero(present)]
        confident = np.where(share >= usual, share, 0.0)
        confident[every, self.labels] = 0.0
        believed, of_label = confident.argmax(axis=1), share[every, self.labels]
        found = (confident.max(axis=1) > of_label) & (of_label < usual[self.labels])
        for name in self.networks:
            found &= self.table.logits[name].argmax(axis=1) == believed
        margin = np.where(found, confident.max(axis=1) - of_label, -1.0)
        return [self._hard(row, int(believed[row])) for row in np.argsort(-margin, kind="stable")[: found.sum()]]

    @cached_property
    def _share(self) -> np.ndarray:
        """(N, C) the ensemble's probabilities as shares of their sum."""
        return self.rows.probabilities / self.rows.probabilities.sum(axis=1, keepdims=True)

    def _hard(self, row: int, believed: int) -> Hard:
        claims = [self.diagnoses[column] for column in np.flatnonzero(self.rows.decisions[row])]
        return Hard(
            lesion_id=str(self.rows.lesion_ids[row]),
            label=self.diagnoses[self.labels[row]],
            believed=self.diagnoses[believed],
            of_label=float(self._share[row, self.labels[row]]),
            of_believed=float(self._share[row, believed]),
            claimed=", ".join(claims) or "nothing",
            agree=sum(int(self.table.logits[name][row].argmax()) == believed for name in self.networks),
        )

    def _slice_masks(self) -> dict[str, dict[str, np.ndarray]]:
        """Of each known metadata field, ordinal ones first and numbers last, the lesions (N,) of each value."""
        values = dict(zip(self.table.metadata_fields, self.table.metadata.T, strict=True))
        known = [METADATA_FIELDS[name] for name in values if name in METADATA_FIELDS]
        known.sort(key=lambda field: ("ordinal", "category", "number").index(field.kind))
        return {field.name: slice_masks(field, values[field.name]) for field in known}

    def _slice(self, field: str, value: str, mask: np.ndarray) -> Slice:
        size = len(self.diagnoses)
        inside = np.bincount(self.labels[mask], minlength=size)
        outside = np.bincount(self.labels[~mask], minlength=size)
        kept = (inside >= LEAST_IN_SLICE) & (outside >= LEAST_IN_SLICE)
        if kept.sum() < 2:
            return Slice(field, value, int(mask.sum()), int(kept.sum()), None, None)
        f1 = metrics.bootstrap_f1(self.rows.decisions[mask], self.labels[mask], self.resamples)[:, kept].mean(axis=1)
        own = metrics.class_counts(self.rows.decisions[mask], self.labels[mask])
        rest = metrics.class_counts(self.rows.decisions[~mask], self.labels[~mask])
        return Slice(
            field=field,
            value=value,
            lesions=int(mask.sum()),
            diagnoses=int(kept.sum()),
            macro_f1=metrics.interval_of(float(own.f1[kept].mean()), f1),
            behind=metrics.recall_difference(own, rest, kept),
        )


def slice_masks(field: MetadataField, values: np.ndarray) -> dict[str, np.ndarray]:
    """The lesions (N,) bool of each category, or of each range of a number, and those whose value (N,) is missing.

    A number is divided at `field.cuts`, or at the quartiles of the values.
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
