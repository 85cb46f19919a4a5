"""The content of the report as numbers: read from a run folder and computed, before it is drawn or written.

Shapes: N lesions, C diagnoses, F columns of the stacker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from triderm_dist import intervals, metrics
from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.config import CONFIG_FILE, Experiment, load_run, read_yaml
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.open import has_tars
from triderm_dist.data.synthetic import is_synthetic
from triderm_dist.ensemble.artifact import Ensemble, FitKeys, read_json, read_task
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.predict import check_task, check_weights
from triderm_dist.ensemble.run_files import (
    ALIGNMENTS_FILE,
    ENSEMBLE,
    ENSEMBLE_FILE,
    NESTED_FILE,
    OOF_FILE,
    PREDICTIONS_FILE,
    STACK_FILE,
    read_held_out,
    read_nested,
)
from triderm_dist.ensemble.score_table import Row
from triderm_dist.ensemble.stack_inputs import stacker_columns
from triderm_dist.environment import read_environment
from triderm_dist.models.attention import AttentionMaps
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import OofFile, read_predictions
from triderm_dist.report.calibration import EnsembleCalibration
from triderm_dist.report.cohort import Cohort, FlowStep, PackingFacts, exclusions, packing_facts
from triderm_dist.report.discrimination import Discrimination
from triderm_dist.report.label_errors import LabelErrors, find_label_errors
from triderm_dist.report.learning_curve import LearningCurve, read_learning_curve
from triderm_dist.report.provenance import Provenance
from triderm_dist.report.slices import ScoredLesions, SliceScore, score_slices, slice_masks
from triderm_dist.runtime.redact import redact
from triderm_dist.schema import UNLABELED, VIEWS, DataError, InputError
from triderm_dist.settings import NULL, parse_yaml, untyped

GROUP = "lesions in a group"
"""In the place of a field's name (which has no space): whether a lesion's group, such as a patient, has others."""

MIN_COMMON_LESIONS = 20
"""A diagnosis with fewer lesions is left out of the macro F1 of common diagnoses."""

TEST_SET_LESIONS = 479
"""The size of test set whose spread is shown where no test set was scored: that of the MILK10k challenge."""

PHOTOS, CONCEPTS = "photos of a lesion", "concepts of a lesion"
"""In the place of a field's name: which photos a lesion has, and whether concept scores are missing."""

PICTURED_LESIONS = 12
"""Lesions of a list whose photos are shown, at most."""
HARDEST_LESIONS = 20
TYPICAL_DIAGNOSES = 12
"""Diagnoses of which the best and the median lesion are shown, at most."""
MISLABELED_LESIONS = 30
"""Lesions in the list of probable label errors, at most."""
CONTRIBUTION_LESIONS = 1000
"""Largest number of lesions for which contributions of the stacker's columns are computed."""

Attend = Callable[[Sequence[str]], Mapping[str, AttentionMaps]]
"""Returns the attention maps of lesions of the training set by id, each of a network that was not trained on it."""


@dataclass(frozen=True)
class MissingInput:
    """Argmax macro F1 of a network with one input hidden.  difference: minus with all inputs.

    name: a view, `concepts` or `metadata`.
    """

    model: str
    name: str
    macro_f1: float
    difference: intervals.Interval


@dataclass(frozen=True)
class DoubtfulLesion:
    """A lesion whose label the ensemble finds improbable.

    alternative: a more probable diagnosis.  predicted: the decisions, comma-separated.  agree: how many networks find
    the alternative most probable. Probabilities are shares of the lesion's sum.
    """

    lesion_id: str
    label: str
    alternative: str
    label_probability: float
    alternative_probability: float
    predicted: str
    agree: int


@dataclass(frozen=True)
class Contributions:
    """Contributions of the stacker's columns to its scores: values (N, C, F), columns (N, F), and their F names."""

    values: np.ndarray
    columns: np.ndarray
    names: tuple[str, ...]


class Content:
    """Everything that the page shows; each part is computed once, on first use.

    Raises DataError where ensemble.json, ensemble_oof.parquet or oof.parquet is missing, or they do not belong
    together.
    """

    def __init__(self, run_folder: Path, shows_photos: bool = True, attend: Attend | None = None) -> None:
        """attend: None shows photos without attention."""
        self.folder = Path(run_folder)
        self.shows_photos, self._attend = shows_photos, attend
        self.ensemble = Ensemble.load(self.folder / ENSEMBLE_FILE)
        self.fit = read_json(self.folder / ENSEMBLE_FILE, schema=FitKeys)
        self.rows = read_nested(self.folder / NESTED_FILE)
        self._oof = OofFile(self.folder / OOF_FILE)
        table = self._oof.table(logits_only=True)
        check_task(self.folder, table.task)
        check_weights(self.folder, table.hashes.items())
        if not np.array_equal(table.lesion_ids, self.rows.lesion_ids):
            row_of = {lesion: row for row, lesion in enumerate(table.lesion_ids)}
            if any(lesion not in row_of for lesion in self.rows.lesion_ids):
                raise DataError(
                    f"{self.folder / NESTED_FILE}: holds lesions that {OOF_FILE} lacks; run triderm stack again"
                )
            table = table.take(np.array([row_of[lesion] for lesion in self.rows.lesion_ids]))
        self.table = table
        self.task = read_task(self.folder / ENSEMBLE_FILE)
        self.diagnoses = self.task.diagnosis_names
        self.resamples = int(self.fit["bootstrap"])

    @property
    def labels(self) -> np.ndarray:
        return self.rows.labels

    @cached_property
    def groups(self) -> np.ndarray:
        """(N,) int64 numbers of the lesions' groups, in the alphabetical order of their names."""
        return intervals.group_numbers(self.table.groups)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """The title of the task."""
        return self.task.title or self.task.name

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that the ensemble was fitted on, also where one of them predicts alone."""
        return tuple(self.fit["weights_of"])

    @cached_property
    def scores(self) -> list[Row]:
        """The score table, the ensemble last."""
        return [Row.from_json(name, scores) for name, scores in self.fit["scores"].items()]

    @cached_property
    def score(self) -> intervals.Interval:
        """Nested macro F1 of the ensemble."""
        return next(row.nested for row in self.scores if row.name == ENSEMBLE)

    @cached_property
    def held_out(self) -> dict[str, Any] | None:
        """heldout.json, if the test set was scored."""
        return read_held_out(self.folder)

    @cached_property
    def settings(self) -> str:
        """The text of config.yaml without secrets, which earlier versions saved; "" if there is none."""
        path = self.folder / CONFIG_FILE
        return redact(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else ""

    @cached_property
    def transforms(self) -> tuple[int, int]:
        """Over how many transforms out-of-fold and test predictions are averaged, by config.yaml."""
        settings = untyped(parse_yaml(self.settings, str(self.folder / CONFIG_FILE))) or {}
        return (settings.get("oof") or {}).get("tta", 1), (settings.get("predict") or {}).get("transforms", 8)

    @cached_property
    def synthetic(self) -> bool:
        """Whether the photos were declared synthetic when the run was trained, or a notice in their folder says so."""
        recorded = read_environment(self.folder)["data"].get("train", {}).get("synthetic")
        if recorded is not None:
            return bool(recorded)
        file = self.folder / CONFIG_FILE
        source = (read_yaml(file).get("data") or {}).get("source") if file.exists() else None
        return source is not None and source not in NULL and is_synthetic(str(source))

    @cached_property
    def counts(self) -> metrics.ClassCounts:
        return metrics.class_counts(self.rows.decisions, self.labels)

    @cached_property
    def class_intervals(self) -> list[intervals.Interval]:
        """F1 of each diagnosis."""
        return intervals.f1_per_class(self.rows.decisions, self.labels, self.groups)

    @cached_property
    def metric_values(self) -> dict[str, intervals.Interval]:
        """Every metric of `metrics.METRICS`, by name."""
        rows = self.rows
        return intervals.of_metrics(
            metrics.METRICS, rows.probabilities, rows.labels, rows.decisions, self.groups, self.resamples
        )

    @cached_property
    def discrimination(self) -> Discrimination:
        """Rates, rankings, operating points and net benefit."""
        codes = self.groups if np.bincount(self.groups).max() > 1 else None
        return Discrimination(self.task, self.rows, codes)

    @cached_property
    def calibration(self) -> EnsembleCalibration:
        """What the probabilities are worth as probabilities."""
        return EnsembleCalibration(self.discrimination, self.table, self.ensemble, self.networks)

    @cached_property
    def common_score(self) -> intervals.Interval | None:
        """Macro F1 of the diagnoses with `MIN_COMMON_LESIONS` lesions; None if these are all, or none."""
        positives = self.counts.positives
        common = positives >= MIN_COMMON_LESIONS
        if not common.any() or common[positives > 0].all():
            return None
        return intervals.macro_f1(self.rows.decisions, self.labels, self.groups, common)

    @cached_property
    def test_set(self) -> tuple[int, intervals.Interval]:
        """The size of a test set, and the spread of macro F1 that test sets of this size would show."""
        lesions = int(self.held_out["n"]) if self.held_out else TEST_SET_LESIONS
        spread = intervals.spread(self.rows.decisions, self.labels, lesions, self.groups, self.resamples)
        return lesions, spread

    @cached_property
    def fold_scores(self) -> list[float]:
        """Nested macro F1 of the lesions of each fold."""
        folds = self.rows.folds
        return [metrics.macro_f1(self.rows.decisions[folds == k], self.labels[folds == k]) for k in np.unique(folds)]

    @cached_property
    def fold_scores_of_networks(self) -> dict[str, list[float]]:
        """Macro F1 by argmax of the lesions of each fold, by network."""
        folds, logits = self.rows.folds, self.table.logits
        return {
            name: [metrics.argmax_macro_f1(logits[name][folds == k], self.labels[folds == k]) for k in np.unique(folds)]
            for name in self.networks
        }

    @cached_property
    def confusion(self) -> np.ndarray:
        """(C, C + 1) lesions of each diagnosis (row) by predicted diagnosis; last column: nothing predicted.

        A lesion with several predictions counts in each of their columns.
        """
        size = len(self.diagnoses)
        result = np.zeros((size, size + 1), np.int64)
        for label in range(size):
            decisions = self.rows.decisions[self.labels == label]
            result[label, :size] = decisions.sum(axis=0)
            result[label, size] = (~decisions.any(axis=1)).sum()
        return result

    @cached_property
    def curves(self) -> dict[str, dict[int, list[dict[str, Any]]]]:
        """Records of metrics.jsonl by model and fold."""
        result: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for model in self.table.models:
            for path in sorted((self.folder / model).glob("fold-*/metrics.jsonl")):
                if records := read_metrics(path):
                    result.setdefault(model, {})[int(path.parent.name.removeprefix("fold-"))] = records
        return result

    @cached_property
    def size_curves(self) -> list[LearningCurve]:
        """Macro F1 by the number of training lesions, of the networks that were trained on parts of them."""
        found = [
            read_learning_curve(self.folder, name, self.table, self.groups, self.resamples)
            for name in self.table.models
        ]
        return [curve for curve in found if curve is not None]

    @cached_property
    def stacker(self) -> FittedStacker | None:
        """The fitted stacker, if there is one."""
        path = self.folder / STACK_FILE
        return FittedStacker.load(path) if path.exists() else None

    @cached_property
    def importance(self) -> tuple[str, dict[str, float]] | None:
        """(name of the measure, share by column, largest first) of the stacker's columns."""
        if self.stacker is None:
            return None
        if importance := self.stacker.model.importance():
            measure, values = importance
        elif self.contributions:
            mean = np.abs(self.contributions.values).mean(axis=(0, 1))
            measure, values = "mean absolute contribution", dict(zip(self.contributions.names, mean, strict=True))
        else:
            return None
        total = sum(values.values()) or 1.0
        return measure, {name: value / total for name, value in sorted(values.items(), key=lambda item: -item[1])}

    @cached_property
    def contributions(self) -> Contributions | None:
        """Contributions of the stacker's columns on some of the lesions; None if it has none."""
        if self.stacker is None:
            return None
        rows = np.sort(np.random.default_rng(0).permutation(len(self.table))[:CONTRIBUTION_LESIONS])
        features = (self.folder / ALIGNMENTS_FILE).exists()
        table = self._oof.table(features, self.table.lesion_ids[rows].tolist())
        given = stacker_columns(self.folder, self.stacker.extra, table, self.networks)
        columns = self.stacker.reduce(given)
        values = self.stacker.model.contributions(columns)
        return None if values is None else Contributions(values, columns, self.stacker.feature_names)

    @cached_property
    def malignant(self) -> np.ndarray:
        """(C,) 1 for malignant diagnoses, 0 for benign ones, NaN where the task does not say."""
        return self.discrimination.kinds

    @cached_property
    def slices(self) -> list[SliceScore]:
        """Scores of the lesions with each value of each field, of `PHOTOS`, of `CONCEPTS` and of `GROUP`."""
        rows = self.rows
        lesions = ScoredLesions(rows.probabilities, rows.labels, rows.decisions, self.groups, self.malignant)
        return score_slices(lesions, self._slice_masks())

    @cached_property
    def missing_inputs(self) -> list[MissingInput]:
        """The scores of each network without each of its inputs, where it was predicted so."""
        result = []
        for model in self.networks:
            full = metrics.argmax_decisions(self.table.logits[model])
            for name in (*VIEWS, "concepts", "metadata"):
                logits = self._logits_without(model, name)
                if np.isnan(logits).any():
                    continue
                decisions = metrics.argmax_decisions(logits)
                difference = intervals.paired_difference(decisions, full, self.labels, self.groups, self.resamples)
                result.append(MissingInput(model, name, metrics.macro_f1(decisions, self.labels), difference))
        return result

    @cached_property
    def experiment(self) -> Experiment | None:
        """The settings of the run; None where config.yaml is missing, or this version cannot read it."""
        try:
            return load_run(Experiment, self.folder) if (self.folder / CONFIG_FILE).exists() else None
        except InputError:
            return None

    @cached_property
    def provenance(self) -> Provenance:
        """How the run was made."""
        return Provenance.of(read_environment(self.folder))

    @cached_property
    def packed(self) -> ShardIndex | None:
        """The packed training set, where it is at hand and still the one of the run."""
        return self._packed("train")

    @cached_property
    def packed_rows(self) -> dict[str, int]:
        """The row of each lesion in the packed training set, by its id."""
        return {} if self.packed is None else {str(lesion): row for row, lesion in enumerate(self.packed.lesion_ids)}

    @cached_property
    def photos(self) -> np.ndarray | None:
        """(N, 2) bool, whether a lesion has the photo of each of `VIEWS`; None where the packed set is not at hand."""
        if self.packed is None:
            return None
        row_of = self.packed_rows
        rows = [row_of.get(lesion, -1) for lesion in self.rows.lesion_ids]
        return None if -1 in rows else self.packed.sizes[np.array(rows)] > 0

    @cached_property
    def cohorts(self) -> list[Cohort]:
        """The scored lesions, those of each fold, and those of the test set, if it was predicted."""
        table = self.table
        every = Cohort("all", self.labels, self.groups, table.metadata, table.concepts, self.photos)
        folds = [every.take(f"fold {fold}", self.rows.folds == fold) for fold in np.unique(self.rows.folds)]
        test = [] if self.test_cohort is None else [self.test_cohort]
        return [every, *folds, *test]

    @cached_property
    def test_cohort(self) -> Cohort | None:
        """The lesions of the test set; None where none was predicted."""
        path = self.folder / PREDICTIONS_FILE
        if not path.exists():
            return None
        part = read_predictions(path)
        rows = np.flatnonzero(part.model == part.model[0])
        labels = part.labels[rows]
        known = (labels != UNLABELED).any()
        counts = (self.held_out or {}).get("diagnoses")
        index, photos = self._packed("test"), None
        if index is not None and len(index) == len(rows):
            row_of = {lesion: row for row, lesion in enumerate(index.lesion_ids)}
            found = [row_of.get(lesion, -1) for lesion in part.lesion_ids[rows]]
            photos = None if -1 in found else index.sizes[np.array(found)] > 0
        groups = intervals.group_numbers(part.groups[rows])
        return Cohort(
            "test set", labels if known else None, groups, part.metadata[rows], part.concepts[rows],
            photos, None if known else counts,
        )  # fmt: skip

    @cached_property
    def packing(self) -> PackingFacts | None:
        """What packing recorded of the training set; None where neither the run nor the set tell."""
        recorded = packing_facts(self.provenance.data)
        return PackingFacts(**self.packed.flow()) if recorded is None and self.packed is not None else recorded

    @cached_property
    def flow(self) -> list[FlowStep]:
        """The lesions from the tables of the training set to the figures."""
        data, packed = self.provenance.data, self.packed
        lesions, labeled = data.get("lesions"), data.get("labeled")
        if lesions is None and packed is not None:
            lesions, labeled = len(packed), int((packed.labels != UNLABELED).sum())
        return exclusions(lesions, labeled, len(self.labels), self.packing)

    def _packed(self, split: str) -> ShardIndex | None:
        """Open a packed set of the run in a local folder; None where it is not there, or another one by now."""
        if self.experiment is None:
            return None
        where = self.experiment.train_shards if split == "train" else self.experiment.test_shards
        recorded = (self.provenance.data if split == "train" else self.provenance.test).get("fingerprint")
        if not has_tars(where):
            return None
        try:
            index = read_index(where, tars=slice(0))
        except InputError:
            return None
        return index if recorded in (None, index.fingerprint) else None

    @cached_property
    def hardest(self) -> list[DoubtfulLesion]:
        """The lesions whose label has the smallest probability."""
        of_label = self._shares[np.arange(len(self.labels)), self.labels]
        order = np.argsort(of_label, kind="stable")[:HARDEST_LESIONS]
        return [self._doubtful(row, int(self._shares[row].argmax())) for row in order]

    @cached_property
    def label_errors(self) -> LabelErrors:
        """What confident learning finds in the probabilities of the ensemble."""
        return find_label_errors(self._shares, self.labels)

    @cached_property
    def agreed_errors(self) -> np.ndarray:
        """(n,) bool: of which suspects of `label_errors` every network finds the alternative most probable."""
        suspects, alternatives = self.label_errors.suspects, self.label_errors.alternatives
        agree = np.ones(len(suspects), bool)
        for name in self.networks:
            agree &= self.table.logits[name][suspects].argmax(axis=1) == alternatives
        return agree

    @cached_property
    def mislabeled(self) -> list[DoubtfulLesion]:
        """The suspects of `label_errors` whose alternative every network finds most probable, at most
        `MISLABELED_LESIONS`.
        """
        found, agreed = self.label_errors, np.flatnonzero(self.agreed_errors)[:MISLABELED_LESIONS]
        return [self._doubtful(int(found.suspects[each]), int(found.alternatives[each])) for each in agreed]

    @cached_property
    def typical(self) -> list[DoubtfulLesion]:
        """Of each of the `TYPICAL_DIAGNOSES` most frequent diagnoses, the lesion whose label has the largest
        probability, and the one with the median probability.
        """
        of_label, lesions = self._shares[np.arange(len(self.labels)), self.labels], np.bincount(self.labels)
        result = []
        for label in np.sort(np.argsort(-lesions, kind="stable")[:TYPICAL_DIAGNOSES]):
            rows = np.flatnonzero(self.labels == label)
            if len(rows):
                ordered = rows[np.argsort(-of_label[rows], kind="stable")]
                chosen = dict.fromkeys([ordered[0], ordered[len(rows) // 2]])
                result += [self._doubtful(int(row), int(self._shares[row].argmax())) for row in chosen]
        return result

    @cached_property
    def attention(self) -> Mapping[str, AttentionMaps]:
        """The attention maps of the lesions whose photos are shown, by id.

        Raises InputError or OSError where they cannot be computed.
        """
        lists = (self.hardest[:PICTURED_LESIONS], self.mislabeled[:PICTURED_LESIONS], self.typical)
        ids = dict.fromkeys(lesion.lesion_id for lesions in lists for lesion in lesions)
        return self._attend(list(ids)) if self._attend else {}

    @cached_property
    def _shares(self) -> np.ndarray:
        """(N, C) probabilities of the ensemble, divided by their sum."""
        return metrics.shares(self.rows.probabilities)

    def _logits_without(self, model: str, name: str) -> np.ndarray:
        """Read (N, C) logits of a network with an input hidden, by the weights of the table; NaN without any."""
        logits = np.full_like(self.table.logits[model], np.nan)
        for path in sorted((self.folder / model).glob(f"fold-*/without_{name}.parquet")):
            part = read_predictions(path, features=False)
            rows = np.array([self._row_of.get(lesion, -1) for lesion in part.lesion_ids], np.int64)
            used = (rows >= 0) & (part.model_hash == self.table.hashes[model][rows])
            logits[rows[used]] = part.logits[used]
        return logits

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {lesion: row for row, lesion in enumerate(self.table.lesion_ids)}

    def _doubtful(self, row: int, alternative: int) -> DoubtfulLesion:
        predicted = [self.diagnoses[column] for column in np.flatnonzero(self.rows.decisions[row])]
        return DoubtfulLesion(
            lesion_id=str(self.rows.lesion_ids[row]),
            label=self.diagnoses[self.labels[row]],
            alternative=self.diagnoses[alternative],
            label_probability=float(self._shares[row, self.labels[row]]),
            alternative_probability=float(self._shares[row, alternative]),
            predicted=", ".join(predicted) or "nothing",
            agree=sum(int(self.table.logits[name][row].argmax()) == alternative for name in self.networks),
        )

    def _slice_masks(self) -> dict[str, dict[str, np.ndarray]]:
        """Return by metadata field the lesions (N,) bool of each value: ordinal fields first, numbers last.

        `PHOTOS`, `CONCEPTS` and `GROUP` follow, where lesions differ in them.
        """
        values = dict(zip(self.task.field_names, self.table.metadata.T, strict=True))
        fields = sorted(self.task.fields, key=lambda field: ("ordinal", "category", "number").index(field.kind))
        masks = {field.name: slice_masks(field, values[field.name]) for field in fields}
        if self.photos is not None and not self.photos.all():
            has = {view.label: self.photos[:, VIEWS.index(view.name)] for view in self.task.views}
            masks[PHOTOS] = {f"without {title} photo": ~present for title, present in has.items()}
        missing = np.isnan(self.table.concepts).any(axis=1)
        if missing.any():
            masks[CONCEPTS] = {"complete": ~missing, "some missing": missing}
        sizes = np.bincount(self.groups)
        if sizes.max() > 1:
            single = sizes[self.groups] == 1
            masks[GROUP] = {"one": single, "several": ~single}
        return masks


class _ExtraSet(BaseModel):
    task: str
    lesions: int
    weight: float


class _ExtraKeys(BaseModel):
    extra: list[_ExtraSet] = []


def extra_sets(folder: Path, networks: Sequence[str]) -> list[str]:
    """Name the extra sets whose lesions joined the training of a run's networks, as their fold.json record them."""
    found: dict[str, None] = {}
    for name in networks:
        for path in sorted((folder / name).glob("fold-*/fold.json")):
            try:
                record = read_checked_json(path, _ExtraKeys)
            except DamagedFile as error:
                raise DataError(f"{path}: {error}; delete {path.parent} and run triderm crossval again") from None
            for each in record.get("extra", []):
                found[f"{each['task']} ({each['lesions']:,} lesions, weight {each['weight']:g})"] = None
    return list(found)
