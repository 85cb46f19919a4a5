"""Checks of prediction files against the data and each other, and their merging in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from triderm_dist.predictions.files import OUTPUTS, SCALARS, PredictionFile, group_rows
from triderm_dist.predictions.rows import (
    OUT_OF_FOLD,
    OofTable,
    Predictions,
    describe_not_finite,
    not_finite,
    single,
)
from triderm_dist.schema import DataError, Task


@dataclass(frozen=True)
class DataSplit:
    """The lesions of the data, whose order the out-of-fold table has.

    lesion_ids: (N,) text.  labels, folds: (N,) int64.  task: that of the data, whose titles or decision may have
    changed since the files were written; None takes that of the files.
    """

    lesion_ids: Sequence[str] | np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    task: Task | None = None


class _Checks:
    """Checks of parts against the lesions of the data, and against the parts checked before."""

    def __init__(self, data: DataSplit, where: str) -> None:
        import pyarrow as pa

        self.lesion_ids = np.array(data.lesion_ids, object)
        self.labels = np.asarray(data.labels, np.int64)
        self.folds = np.asarray(data.folds, np.int64)
        self._known = pa.array(self.lesion_ids, pa.string())
        if len(self._known.unique()) != len(self.lesion_ids):
            raise DataError(f"{where}: a lesion id occurs twice")
        self._groups = pa.array([], pa.string())
        self._fold_of_group = np.empty(0, np.int64)
        self._fold_of_weights: dict[tuple[str, str], int] = {}

    def check(self, part: _Part) -> None:
        """Raise DataError for a part that does not match the data or the parts checked before (see `gather`)."""
        if part.split != OUT_OF_FOLD:
            raise DataError(f"{part.path}: holds {part.split} predictions, expected out-of-fold predictions")
        self._check_lesions(part)
        self._check_groups(part)
        self._check_weights(part)

    def rows(self, lesion_ids: Any) -> np.ndarray:
        """Return the row in the data of each id of an Arrow array, -1 for a lesion that is not in the data."""
        import pyarrow.compute as pc

        rows = pc.fill_null(pc.index_in(lesion_ids, value_set=self._known), -1)
        return np.asarray(rows.to_numpy(), np.int64)

    def _check_lesions(self, part: _Part) -> None:
        path, rows, fold = part.path, part.rows, part.fold
        if (at := _first(rows < 0)) is not None:
            raise DataError(f"{path}: lesion {part.lesion_ids[at]} is not in the data")
        for number, model in enumerate(part.models):
            if (row := _first(np.bincount(rows[part.model_of == number]) > 1)) is not None:
                raise DataError(f"{path}: lesion {self.lesion_ids[row]} occurs twice for model {model}")
        if (at := _first(part.labels != self.labels[rows])) is not None:
            raise DataError(
                f"{path}: lesion {part.lesion_ids[at]} has label {part.labels[at]}, in the data it is "
                f"{self.labels[rows[at]]}"
            )
        if (at := _first(fold != self.folds[rows])) is not None:
            raise DataError(
                f"{path}: lesion {part.lesion_ids[at]} is predicted as fold {fold[at]} but belongs to fold "
                f"{self.folds[rows[at]]}: its model was trained on it; train again with the folds of this data"
            )

    def _check_groups(self, part: _Part) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        encoded = part.groups.dictionary_encode()
        codes, names = encoded.indices.to_numpy(), encoded.dictionary
        known = pc.fill_null(pc.index_in(names, value_set=self._groups), -1).to_numpy()
        fold_of_code = np.empty(len(names), np.int64)
        fold_of_code[codes] = part.fold
        fold_of_code[known >= 0] = self._fold_of_group[known[known >= 0]]
        if (at := _first(fold_of_code[codes] != part.fold)) is not None:
            folds = f"{fold_of_code[codes[at]]} and {part.fold[at]}"
            raise DataError(f"{part.path}: group {part.groups[at]} is in folds {folds}: assign folds by group")
        self._groups = pa.concat_arrays([self._groups, names.filter(pa.array(known < 0))])
        self._fold_of_group = np.concatenate([self._fold_of_group, fold_of_code[known < 0]])

    def _check_weights(self, part: _Part) -> None:
        import pyarrow as pa

        table = pa.table({"model": part.model_of, "weights": part.hash_of, "fold": part.fold})
        for each in table.group_by(table.column_names, use_threads=False).aggregate([]).to_pylist():
            model, weights, fold = part.models[each["model"]], part.hashes[each["weights"]], each["fold"]
            if weights and (other := self._fold_of_weights.setdefault((model, weights), fold)) != fold:
                raise DataError(
                    f"{part.path}: weights {weights[:12]} of {model} predict folds {other} and {fold}: they were "
                    "trained on one of them"
                )


def _first(wrong: np.ndarray) -> int | None:
    """Return the index of the first True, None if there is none."""
    return int(wrong.argmax()) if wrong.any() else None


class _Part:
    """The columns of a prediction file that are no lists. n: its rows.

    lesion_ids, groups: (n,) Arrow text.  labels, fold: (n,) int64.  models, hashes, heads: the distinct values of which
    model_of, hash_of and head_of (n,) are indices.  rows: (n,) in the data, once it is known.
    """

    def __init__(self, file: PredictionFile) -> None:
        import pyarrow as pa

        self.file, self.path, self.split = file, file.path, file.split
        text = {name: [pa.array([], pa.string())] for name in ("lesion_id", "group")}
        numbers = {name: [np.empty(0, np.int64)] for name in ("label", "fold", "model", "model_hash", "head")}
        distinct: dict[str, dict[str, int]] = {name: {} for name in ("model", "model_hash", "head")}
        for table in file.tables(SCALARS):
            for name in SCALARS:
                column = table[name].combine_chunks()
                if name in text:
                    text[name].append(column)
                elif name in distinct:
                    encoded, known = column.dictionary_encode(), distinct[name]
                    codes = [known.setdefault(each, len(known)) for each in encoded.dictionary.to_pylist()]
                    numbers[name].append(np.array(codes, np.int64)[encoded.indices.to_numpy()])
                else:
                    numbers[name].append(column.to_numpy().astype(np.int64))
        self.lesion_ids, self.groups = (pa.concat_arrays(text[name]) for name in ("lesion_id", "group"))
        joined = {name: np.concatenate(parts) for name, parts in numbers.items()}
        self.labels, self.fold = joined["label"], joined["fold"]
        self.models, self.model_of = tuple(distinct["model"]), joined["model"]
        self.hashes, self.hash_of = tuple(distinct["model_hash"]), joined["model_hash"]
        self.heads, self.head_of = tuple(distinct["head"]), joined["head"]
        self.rows = np.empty(0, np.int64)

    def drop_scalars(self) -> None:
        """Free the memory of what is needed for checks and merging only."""
        del self.lesion_ids, self.groups, self.labels, self.fold, self.hashes, self.hash_of, self.heads, self.head_of


class Gathered:
    """Checked prediction files whose outputs are still to be read.

    scalars: the table without outputs, but with concepts and metadata.
    """

    def __init__(self, files: Sequence[PredictionFile], models: Sequence[str] | None, data: DataSplit | None) -> None:
        """data: None takes the lesions of the first model of the first file.  models: see `gather`. Raises DataError
        where files do not match the data, or overlap or differ in names, heads or widths.
        """
        self._parts = []
        checks = None if data is None else _Checks(data, "the data")
        for file in files:
            part = _Part(file)
            if checks is None:
                own = np.flatnonzero(part.model_of == 0)
                ids = part.lesion_ids.take(own).to_numpy(zero_copy_only=False)
                checks = _Checks(DataSplit(ids, part.labels[own], part.fold[own]), str(part.path))
            part.rows = checks.rows(part.lesion_ids)
            checks.check(part)
            if models is not None and (unknown := sorted(set(part.models) - set(models))):
                expected = ", ".join(models)
                raise DataError(f"{part.path}: holds unexpected model {unknown[0]!r}; expected {expected}")
            self._parts.append(part)
        assert checks is not None
        self._feature_widths: dict[str, int] = {}
        self.scalars = self._merge(models, checks)
        for part in self._parts:
            part.drop_scalars()
        if data is not None and data.task is not None:
            if not self.scalars.task.matches(data.task):
                name = self.scalars.task.name
                raise DataError(
                    f"{files[0].path}: is for task {name!r}, but the data are of task {data.task.name!r}; train again"
                )
            self.scalars = replace(self.scalars, task=data.task)

    def table(self, keys: Sequence[str] = OUTPUTS, rows: np.ndarray | None = None) -> OofTable:
        """Return the table with these outputs; others are (N, 0). rows: only these rows, in this order."""
        table, place = self.scalars, np.arange(len(self.scalars))
        if rows is not None:
            table, place = table.take(rows), np.full(len(table), -1)
            place[rows] = np.arange(len(rows))
        found: dict[str, dict[str, np.ndarray]] = {key: {} for key in keys}
        for part in self._parts:
            for name, positions, values in self._outputs(part, keys):
                target = place[positions]
                for key, value in values.items():
                    if name not in found[key]:
                        found[key][name] = np.full((len(table), value.shape[1]), np.nan, np.float32)
                    found[key][name][target[target >= 0]] = value[target >= 0]
        ordered = {key: {name: by_model[name] for name in table.models} for key, by_model in found.items()}
        return replace(table, **ordered)  # type: ignore[arg-type]

    def chunks(self, model: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield (first row, outputs) of a model for all rows in order, NaN without a prediction."""
        sources = [self._in_order(part, model) for part in self._parts if model in part.models]
        waiting = [next(source) for source in sources]
        widths = {key: value.shape[1] for key, value in waiting[0][1].items()}
        size = group_rows(widths["features"])
        for start in range(0, len(self.scalars), size):
            stop = min(start + size, len(self.scalars))
            outputs = {key: np.full((stop - start, width), np.nan, np.float32) for key, width in widths.items()}
            for number, source in enumerate(sources):
                while len(waiting[number][0]) and waiting[number][0][0] < stop:
                    rows, values = waiting[number]
                    end = int(np.searchsorted(rows, stop))
                    for key, value in values.items():
                        outputs[key][rows[:end] - start] = value[:end]
                    rest = rows[end:], {key: value[end:] for key, value in values.items()}
                    waiting[number] = rest if len(rest[0]) else next(source, rest)
            yield start, outputs

    def _in_order(self, part: _Part, model: str) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yield (rows, outputs) of a model in a part by ascending row, of a file in another order all at once."""
        found = ((rows, values) for name, rows, values in self._outputs(part, OUTPUTS) if name == model)
        if (np.diff(part.rows[part.model_of == part.models.index(model)]) > 0).all():
            yield from found
            return
        pairs = list(found)
        rows = np.concatenate([each for each, _ in pairs])
        order = np.argsort(rows)
        yield rows[order], {key: np.concatenate([values[key] for _, values in pairs])[order] for key in OUTPUTS}

    def _outputs(self, part: _Part, keys: Sequence[str]) -> Iterator[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
        """Yield (model, rows in the data (n,), lists (n, W)) in the order of a file."""
        import pyarrow as pa

        start = 0
        for table in part.file.tables(keys):
            here = slice(start, start + len(table))
            for number, name in enumerate(part.models):
                mask = part.model_of[here] == number
                if mask.any():
                    # Models differ in the width of their features.
                    own = table if mask.all() else table.filter(pa.array(mask))
                    values = {key: part.file.matrix(own, key) for key in keys}
                    self._check_widths(part, name, values)
                    rows = part.rows[here][mask]
                    if "logits" in values:
                        self._check_finite(part, name, rows, values["logits"])
                    yield name, rows, values
            start += len(table)

    def _check_widths(self, part: _Part, model: str, values: Mapping[str, np.ndarray]) -> None:
        file = part.file
        for key, value in values.items():
            found, width = value.shape[1], file.width(key)
            if key == "features":
                width = self._feature_widths.setdefault(model, found)
                if found != width:
                    raise DataError(f"{part.path}: {key} of {model} has width {found}, but {width} in another file")
            elif found != width:
                raise DataError(f"{part.path}: {key} of {model} has {found} numbers per row, expected {width}")

    def _check_finite(self, part: _Part, model: str, rows: np.ndarray, logits: np.ndarray) -> None:
        """Raise DataError for logits (n, C) that are not finite; a written table has NaN for lesions without any."""
        bad = rows[not_finite(logits)]
        if (bad := bad[self.scalars.hashes[model][bad] != ""]).size:
            fold = int(self.scalars.folds[bad[0]])
            raise DataError(f"{part.path}: {describe_not_finite(model, fold, self.scalars.lesion_ids[bad])}")

    def _merge(self, models: Sequence[str] | None, data: _Checks) -> OofTable:
        """Return the table without outputs. Raises DataError where files overlap or differ in names or heads."""
        first = self._parts[0]
        rows = len(data.lesion_ids)
        found = tuple(dict.fromkeys(model for part in self._parts for model in part.models))
        if models is not None and (absent := [name for name in models if name not in found]):
            raise DataError(f"no predictions of model {absent[0]!r} found; train it, or remove it from models")
        names = found if models is None else tuple(models)
        groups = data.lesion_ids.copy()
        concepts = np.full((rows, len(first.file.concept_names)), np.nan, np.float32)
        metadata = np.full((rows, len(first.file.task.fields)), np.nan, np.float32)
        heads: dict[str, str] = {}
        hashes = {name: np.full(rows, "", object) for name in names}
        predicted = {name: np.zeros(rows, bool) for name in names}
        for part in self._parts:
            path = part.path
            if difference := mismatch(part.file, first.file):
                raise DataError(f"{path}: is for {difference} than {first.path}")
            for number, name in enumerate(part.models):
                mask = part.model_of == number
                positions = part.rows[mask]
                if predicted[name][positions].any():
                    lesion = data.lesion_ids[positions[predicted[name][positions]][0]]
                    raise DataError(f"{path}: lesion {lesion} was already predicted by model {name} in another file")
                predicted[name][positions] = True
                head = single([part.heads[each] for each in np.unique(part.head_of[mask])], "head", path)
                if heads.setdefault(name, head) != head:
                    raise DataError(f"{path}: model {name} has a {head} head, but a {heads[name]} head in another file")
                hashes[name][positions] = np.array(part.hashes, object)[part.hash_of[mask]]
            groups[part.rows] = part.groups.to_numpy(zero_copy_only=False)
            for _, positions, values in self._outputs(part, ("concepts", "metadata")):
                concepts[positions], metadata[positions] = values["concepts"], values["metadata"]
        empty = {name: np.empty((rows, 0), np.float32) for name in names}
        return OofTable(
            lesion_ids=data.lesion_ids,
            groups=groups,
            labels=data.labels,
            folds=data.folds,
            concepts=concepts,
            metadata=metadata,
            models=names,
            heads={name: heads[name] for name in names},
            logits=empty,
            aux_clinical=empty,
            aux_dermoscopic=empty,
            features=empty,
            hashes=hashes,
            task=first.file.task,
            concept_names=first.file.concept_names,
        )


def mismatch(part: Predictions | PredictionFile, other: Predictions | PredictionFile) -> str:
    """Name what keeps two files from being combined, "" if nothing does."""
    if not part.task.matches(other.task):
        return "another task"
    return "" if part.concept_names == other.concept_names else "other concepts"
