"""Check the inputs of all stages of a run before its first one: labels, folds, stacker, test set, truth, disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from triderm_dist.config import Experiment
from triderm_dist.data.folds import assign_folds, decimal_order
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.dataset import Spellings
from triderm_dist.data.readers.lesion_table import LesionTable
from triderm_dist.data.readers.source import find_task, read_source, reader_of
from triderm_dist.data.shards.console import print_problems
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import is_packed, open_index
from triderm_dist.doctor.disk import disk_finding
from triderm_dist.ensemble.nested_stack import check_stackable
from triderm_dist.ensemble.weights import check_use
from triderm_dist.files import check_no_file
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.schema import UNLABELED, ConfigError, DataError, InputError, Task


@dataclass(frozen=True)
class LesionSet:
    """The lesions of a set, packed or not, for checks.

    where: folder of the set.  labels: (N,).  groups: returns (N,) integers, the groups that folds keep together.
    folds: assigns folds, as `ShardIndex.folds`.
    """

    where: str
    task: Task
    lesion_ids: Sequence[str]
    labels: np.ndarray
    groups: Callable[[], np.ndarray]
    folds: Callable[[int, int], np.ndarray]
    concepts: tuple[str, ...]


def check_pipeline(experiment: Experiment) -> list[str]:
    """Check the inputs of all stages of a pipeline, and return notes. Raises InputError if a stage would fail."""
    data = experiment.data
    check_members(experiment)
    _check_truth_file(experiment)
    if experiment.tokens:
        check_no_file("tokens", experiment.tokens)
    _check_towers(experiment)
    notes = list[str]()

    def check(train: LesionSet) -> None:
        check_training(experiment, train)
        if experiment.stack.enabled:
            try:
                check_stackable(*_labeled(experiment, train), experiment.seed)
            except DataError as error:
                raise DataError(f"{train.where}: {error}; set stack.enabled=false, or add lesions") from None

    train = _read(experiment, "train", data.source, check)
    if data.test or data.test_shards:

        def check_test(test: LesionSet) -> None:
            if train:
                _check_concepts(train, test)
            if data.test_truth:
                notes.extend(match_truth(data.test_truth, test.task, test.lesion_ids)[1])

        _read(experiment, "test", data.test, check_test)
    for where, each in data.extra_sets.items():
        index = open_index(each.shards, data.remote)
        if train:
            from triderm_dist.data.union import map_labels  # imports PyTorch

            map_labels(each.map, index, train.task.diagnosis_names, where)
    return notes


def check_training(experiment: Experiment, train: LesionSet) -> None:
    """Raise DataError if a training set cannot be split into the folds, or has fewer than two diagnoses."""
    present = np.unique(train.labels[train.labels != UNLABELED])
    if len(present) < 2:
        found = f"has lesions of {train.task.diagnosis_names[present[0]]} only" if len(present) else "has no labels"
        raise DataError(f"{train.where}: {found}; a training needs at least two diagnoses")
    try:
        train.folds(experiment.data.folds, experiment.data.fold_seed)
    except DataError as error:
        raise DataError(f"{train.where}: {error}") from None


def check_members(experiment: Experiment) -> None:
    """Raise ConfigError for a member of the ensemble that is not one of the models, or of `ensemble.use`."""
    for name in experiment.ensemble.members or ():
        if name not in experiment.models:
            raise ConfigError(f"ensemble.members: no model is named {name!r}; {did_you_mean(name, experiment.models)}")
    check_use(experiment, experiment.ensemble.members or tuple(experiment.models))


def check_disk(experiment: Experiment, index: ShardIndex) -> list[str]:
    """Return a note if a training may run out of disk space.

    Raises InputError if less than half of the estimate is free.
    """
    test = str(experiment.test_shards)
    try:
        packed = open_index(test, experiment.data.remote) if is_packed(test) else test
    except InputError:
        packed = test
    found = disk_finding(experiment, index.signature, index, packed)
    if found.state == "ok":
        return []
    if found.state == "error":
        raise InputError(f"{experiment.folder}: {found.name}: {found.text}; {found.advice}")
    return [f"{found.name}: {found.text}; {found.advice}"]


def lesions_of(index: ShardIndex) -> LesionSet:
    """Return the lesions of a packed set."""
    return LesionSet(
        str(index.folder), index.task, index.lesion_ids, index.labels, lambda: index.fold_groups, index.folds,
        index.concepts,
    )  # fmt: skip


def _read(
    experiment: Experiment, split: str, source: str | None, check: Callable[[LesionSet], None]
) -> LesionSet | None:
    """Read a set and check it: the packed one, or the folder to pack if that is absent or fails the check.

    Returns None for a folder whose rows have problems, which packing will list.
    """
    shards = experiment.train_shards if split == "train" else experiment.test_shards
    given = experiment.data.shards if split == "train" else experiment.data.test_shards
    if is_packed(shards):
        try:
            lesions = lesions_of(open_index(shards, experiment.data.remote))
            check(lesions)
            return lesions
        except InputError:
            if given or source is None or not Path(source).exists():
                raise  # else the folder has changed since, and is packed again
    assert source is not None
    task = find_task(str(experiment.data.source or source), experiment.data.task)
    try:
        dataset = read_source(source, task, experiment.data.missing_view, experiment.data.invalid)
    except InvalidLesions as error:
        if split == "train":
            return None
        print_problems(error.problems, Path(f"{shards}.problems.csv"))
        raise
    table = LesionTable.of(dataset.lesions)
    _, first, groups = np.unique(table.distinct_groups()[0], return_index=True, return_inverse=True)
    codes = np.argsort(np.argsort(first))[groups]  # in the order in which they appear
    labels, groups = table.labels.astype(np.int64), decimal_order(len(first))[codes]
    lesions = LesionSet(
        source, task, table.ids.tolist(), labels, lambda: groups, partial(assign_folds, labels, groups),
        dataset.concepts,
    )  # fmt: skip
    check(lesions)
    return lesions


def _labeled(experiment: Experiment, train: LesionSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, groups and folds of the labeled lesions."""
    folds = train.folds(experiment.data.folds, experiment.data.fold_seed)
    rows = folds >= 0
    return train.labels[rows], train.groups()[rows], folds[rows]


def _check_concepts(train: LesionSet, test: LesionSet) -> None:
    if differing := sorted(set(train.concepts) ^ set(test.concepts)):
        owner = "the training set" if differing[0] in train.concepts else "the test set"
        raise DataError(
            f"{test.where}: its concepts are not those of the training set (only {owner} has {differing[0]}); give "
            "both the same columns"
        )


def _check_truth_file(experiment: Experiment) -> None:
    truth = experiment.data.test_truth
    if truth and not Path(truth).is_file():
        raise DataError(f"data.test_truth: {truth}: no such file; correct it, or remove it where the truth is unknown")
    if truth and not (experiment.data.test or experiment.data.test_shards):
        raise ConfigError("data.test_truth: has no effect without a test set; set data.test, or remove it")


def match_truth(path: str, task: Task, lesion_ids: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Return the label of each lesion of a table with the ground truth of a test set, and a note on other lesions.

    Raises DataError for an invalid table, and if a lesion of the test set has no label.
    """
    truth = reader_of(task).labels(Path(path), task)
    names = [str(name) for name in lesion_ids]
    absent = [name for name in names if truth.get(name, UNLABELED) == UNLABELED]
    others = truth.keys() - set(names)
    if absent:
        hint = Spellings([*others]).hint(absent[0], "add them, or remove data.test_truth")
        raise DataError(
            f"{path}: has no label of {len(absent)} of {len(names)} test lesions, the first is {absent[0]}; {hint}"
        )
    return truth, [f"{path}: {len(others)} lesions are not in the test set"] if others else []


def _check_towers(experiment: Experiment) -> None:
    """Check that the weights of towers can be found, except for models with finished folds: a run stores its towers."""
    for name, model in experiment.models.items():
        folds = range(experiment.data.folds)
        if any((experiment.fold_folder(name, fold) / "fold.json").exists() for fold in folds):
            continue
        from triderm_dist.models.towers import locate_weights  # imports PyTorch

        try:
            locate_weights(model.tower.source, model.tower.pretrained)
        except InputError as error:
            raise ConfigError(f"models.{name}.tower.source: {error}") from None
