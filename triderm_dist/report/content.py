"""The content of the report as numbers: read from a run folder and computed, before it is drawn or written.

Shapes: N lesions, C diagnoses, F columns of the stacker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.config import CONFIG_FILE, Experiment, load_run, read_yaml
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.open import has_tars
from triderm_dist.data.synthetic import is_synthetic
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.run_files import (
    ENSEMBLE,
    NESTED_FILE,
    OOF_FILE,
    PREDICTIONS_FILE,
    STACK_FILE,
    read_held_out,
    read_nested,
)
from triderm_dist.ensemble.score_table import ScoreRow
from triderm_dist.environment import read_environment
from triderm_dist.models.attention import AttentionMaps
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import OofFile, read_predictions, rows_of
from triderm_dist.report.calibration import EnsembleCalibration
from triderm_dist.report.cohort import Cohort, FlowStep, PackingFacts, exclusions, packing_facts
from triderm_dist.report.contributions import Contributions, column_importance, find_contributions
from triderm_dist.report.discrimination import Discrimination
from triderm_dist.report.learning_curve import LearningCurve, read_learning_curve
from triderm_dist.report.lesion_lists import LesionLists
from triderm_dist.report.missing_inputs import MissingInput, score_missing_inputs
from triderm_dist.report.provenance import Provenance
from triderm_dist.report.slices import ScoredLesions, SliceScore, all_slice_masks, score_slices
from triderm_dist.runtime.redact import redact, redact_tree
from triderm_dist.schema import UNLABELED, DataError, InputError
from triderm_dist.settings import NULL, parse_yaml, untyped

MIN_COMMON_LESIONS = 20
"""A diagnosis with fewer lesions is left out of the macro F1 of common diagnoses."""

Attend = Callable[[Sequence[str]], Mapping[str, AttentionMaps]]
"""Returns the attention maps of lesions of the training set by id, each of a network that was not trained on it."""


class Content:
    """Everything that the page shows; each part is computed once, on first use.

    Raises DataError where ensemble.json, ensemble_oof.parquet or oof.parquet is missing, or they do not belong
    together.
    """

    def __init__(self, run_folder: Path, shows_photos: bool = True, attend: Attend | None = None) -> None:
        """attend: None shows photos without attention."""
        self.folder = Path(run_folder)
        self.shows_photos, self._attend = shows_photos, attend
        self._fitted = fitted = FittedEnsemble.load(self.folder)
        self.ensemble, self.fit, self.task = fitted.ensemble, fitted.fit, fitted.task
        self.rows = read_nested(self.folder / NESTED_FILE)
        fitted.check_files(NESTED_FILE)
        self._oof = OofFile(self.folder / OOF_FILE)
        table = self._oof.table(logits_only=True)
        fitted.check_task(table.task)
        fitted.check_weights(table.hashes.items())
        if not np.array_equal(table.lesion_ids, self.rows.lesion_ids):
            rows = rows_of(self.rows.lesion_ids, table.lesion_ids)
            if (rows < 0).any():
                raise DataError(
                    f"{self.folder / NESTED_FILE}: holds lesions that {OOF_FILE} lacks; run triderm stack again"
                )
            table = table.take(rows)
        self.table = table
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
    def scores(self) -> list[ScoreRow]:
        """The score table, the ensemble last."""
        return [ScoreRow.from_json(name, scores) for name, scores in self.fit["scores"].items()]

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
        return redact(self._settings_text)

    @cached_property
    def settings_tree(self) -> dict[str, Any]:
        """The content of config.yaml without secrets; {} if there is none. Raises ConfigError naming the file."""
        # Not that of `settings`: in YAML, *** without quotes is an alias.
        tree = untyped(parse_yaml(self._settings_text, str(self.folder / CONFIG_FILE))) or {}
        return dict(redact_tree(tree))

    @cached_property
    def _settings_text(self) -> str:
        path = self.folder / CONFIG_FILE
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @cached_property
    def transforms(self) -> tuple[int, int]:
        """Over how many transforms out-of-fold and test predictions are averaged, by config.yaml."""
        settings = self.settings_tree
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
        """The size of a test set, and the spread of macro F1 that test sets of this size would show.

        The size is that of the test set that was scored, else that of a fold.
        """
        lesions = int(self.held_out["n"]) if self.held_out else len(self.labels) // self.fit["folds"]
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
    def training_curves(self) -> dict[str, dict[int, list[dict[str, Any]]]]:
        """Records of metrics.jsonl by model and fold."""
        result: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for model in self.table.models:
            for path in sorted((self.folder / model).glob("fold-*/metrics.jsonl")):
                if records := read_metrics(path):
                    result.setdefault(model, {})[int(path.parent.name.removeprefix("fold-"))] = records
        return result

    @cached_property
    def learning_curves(self) -> list[LearningCurve]:
        """Macro F1 by the number of training lesions, of the networks that were trained on parts of them."""
        found = [
            read_learning_curve(self.folder, name, self.table, self.groups, self.resamples)
            for name in self.table.models
        ]
        return [curve for curve in found if curve is not None]

    @cached_property
    def stacker(self) -> FittedStacker | None:
        """The fitted stacker, if there is one."""
        return self._fitted.load_stacker() if (self.folder / STACK_FILE).exists() else None

    @cached_property
    def importance(self) -> tuple[str, dict[str, float]] | None:
        """(name of the measure, share by column, largest first) of the stacker's columns."""
        return column_importance(self.stacker, self.contributions) if self.stacker else None

    @cached_property
    def contributions(self) -> Contributions | None:
        """Contributions of the stacker's columns on some of the lesions; None if it has none."""
        if self.stacker is None:
            return None
        return find_contributions(self.stacker, self.folder, self._oof, self.table.lesion_ids, self.networks)

    @cached_property
    def slices(self) -> list[SliceScore]:
        """Scores of the lesions with each value of each field, of `PHOTOS`, of `CONCEPTS` and of `GROUP`."""
        rows = self.rows
        lesions = ScoredLesions(rows.probabilities, rows.labels, rows.decisions, self.groups, self.discrimination.kinds)
        table = self.table
        masks = all_slice_masks(self.task, table.metadata, table.concepts, self.groups, self.photos)
        return score_slices(lesions, masks)

    @cached_property
    def missing_inputs(self) -> list[MissingInput]:
        """The scores of each network without each of its inputs, where it was predicted so."""
        return score_missing_inputs(self.folder, self.table, self.networks, self.labels, self.groups, self.resamples)

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
    def photos(self) -> np.ndarray | None:
        """(N, 2) bool, whether a lesion has the photo of each of `VIEWS`; None where the packed set is not at hand."""
        if self.packed is None:
            return None
        rows = rows_of(self.rows.lesion_ids, self.packed.lesion_ids.column)
        return None if (rows < 0).any() else self.packed.sizes[rows] > 0

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
            found = rows_of(part.lesion_ids[rows], index.lesion_ids.column)
            photos = None if (found < 0).any() else index.sizes[found] > 0
        groups = intervals.group_numbers(part.groups[rows])
        return Cohort(
            "test set", labels if known else None, groups, part.metadata[rows], part.concepts[rows],
            photos, None if known else counts,
        )  # fmt: skip

    @cached_property
    def packing(self) -> PackingFacts | None:
        """What packing recorded of the training set; None where neither the run nor the set has it."""
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
    def lesion_lists(self) -> LesionLists:
        """The hardest, the probably mislabeled and the typical lesions."""
        logits = [self.table.logits[name] for name in self.networks]
        return LesionLists(self.rows, logits, self.diagnoses)

    @cached_property
    def attention(self) -> Mapping[str, AttentionMaps]:
        """The attention maps of the lesions whose photos are shown, by id.

        Raises InputError or OSError where they cannot be computed.
        """
        ids = dict.fromkeys(lesion.lesion_id for lesion in self.lesion_lists.pictured)
        return self._attend(list(ids)) if self._attend else {}
