"""A trained run as a Python object: `triderm_dist.load(...)`."""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from triderm_dist.config import Networks
from triderm_dist.data.canvas import fit_to_canvas
from triderm_dist.data.photo_set import Photo, PhotoSet
from triderm_dist.data.readers.cells import parse_field, parse_score
from triderm_dist.data.shards.photos import PhotoError, describe_changes
from triderm_dist.files import expanded, why_no_file
from triderm_dist.inference.chunks import BATCHES
from triderm_dist.inference.export import Format
from triderm_dist.inference.inputs import read_input
from triderm_dist.inference.networks import Device, NetworkLoader, Precision, Preprocessing, choose_device
from triderm_dist.inference.prediction import Prediction
from triderm_dist.inference.predictor import EnsemblePredictions, Predictor
from triderm_dist.inference.run_folder import RunFolder
from triderm_dist.inference.seen_values import read_seen
from triderm_dist.inference.table import photo_set, read_lesions, table_of_frame, text_of
from triderm_dist.models.attention import AttentionMaps
from triderm_dist.models.network import Network
from triderm_dist.runtime.extras import require
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.schema import InputError, MetadataField, Signature, Task, check_choice

if TYPE_CHECKING:
    import pandas as pd

ID = "new"
"""The default lesion id of a prediction."""


class Run:
    """A trained run: its networks, stacker and ensemble. `triderm_dist.load` opens it.

    The networks are loaded at the first prediction, and kept. Several threads may use one run.
    """

    def __init__(
        self,
        folder: RunFolder,
        device: Device | None = None,
        precision: Precision | None = None,
        batch: int | None = None,
    ) -> None:
        """See `triderm_dist.load`. Raises InputError for an unknown precision, or a batch that is not positive."""
        if precision is not None:
            check_choice("precision", precision, get_args(Precision))
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise InputError(f"batch={batch}: must be a number of lesions, 1 or more")
        self._run, self._device, self._precision, self._batch = folder, device, precision, batch
        self._loading = threading.Lock()

    def __repr__(self) -> str:
        networks = f"{sum(map(len, self._run.networks.values()))} networks"
        if self._run.refitted:
            networks += " of the refit (scores of the run are those of the folds)"
        return f"<Run {self.folder}: task {self.task.name}, {len(self.diagnoses)} diagnoses, {networks}>"

    @property
    def folder(self) -> Path:
        return self._run.path

    @property
    def task(self) -> Task:
        return self._run.task

    @property
    def diagnoses(self) -> tuple[str, ...]:
        return self.task.diagnosis_names

    @property
    def views(self) -> tuple[str, ...]:
        """The photos that `predict` takes."""
        return self.task.view_names

    @property
    def fields(self) -> tuple[MetadataField, ...]:
        """The metadata that `predict` takes, with their ranges and categories."""
        return self.task.fields

    @property
    def concepts(self) -> tuple[str, ...]:
        """The names of the concept scores that `predict` takes."""
        return self._run.concepts

    @property
    def members(self) -> tuple[str, ...]:
        """The networks of the ensemble, and `stack` if the stacker is a member."""
        return self._run.fitted.members

    @property
    def predictor(self) -> Predictor:
        """The loaded networks."""
        with self._loading:
            return self._predictor

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor(self._run, device=self._device, precision=self._precision, batch=self._batch)

    def predict(
        self,
        clinical: Photo | None = None,
        dermoscopic: Photo | None = None,
        *,
        concepts: Mapping[str, float | str | None] | None = None,
        lesion_id: str = ID,
        tta: int | None = None,
        **fields: Any,
    ) -> Prediction:
        """Predict one lesion; anything may be left out.

        clinical, dermoscopic: the photos, each a path, the bytes of a photo file, a Pillow image or a NumPy array
        (H, W), (H, W, 3) or (H, W, 4) of uint8.  concepts: scores from 0 to 1 by name (`concepts` of the run).
        fields: metadata by name, such as age=60; numbers and categories are written as in a table of the task.
        tta: number of transforms of the dihedral group to average over, 1, 2, 4 or 8; None takes that of the run.

        Raises InputError, in one line, for an unknown name, a value that the task does not have, and a photo that
        cannot be read.
        """
        photos = self._one_lesion({"clinical": clinical, "dermoscopic": dermoscopic}, concepts, lesion_id, fields)
        predictions = self.predictor.predict(photos, self._transforms(tta))
        return self._prediction(predictions, [*self._warnings(photos), *describe_changes(predictions.changes)])

    def predict_table(
        self,
        table: str | os.PathLike[str] | pd.DataFrame,
        *,
        photos: str | os.PathLike[str] | None = None,
        tta: int | None = None,
        invalid: Literal["refuse", "drop"] = "refuse",
    ) -> pd.DataFrame:
        """Predict the lesions of a table, or of a folder of photos, in their order.

        table: a DataFrame, or the path of a CSV file, a workbook, a folder or a photo, as `triderm predict input=`
        takes it. A column per view (`clinical`, `dermoscopic`) holds paths of photos, others the id, metadata and
        concept scores; what is absent is missing.  photos: the folder that these paths are relative to, by default
        that of the table, and of a DataFrame the working directory.  tta: see `predict`.  invalid: "drop" leaves out
        lesions with an invalid row or an unreadable photo.

        Returns the columns lesion_id, one per diagnosis, decision, and MEMBER/DIAGNOSIS of every member. Warns of what
        is missing for all lesions, of columns that are not used, of lesions with the id of a training lesion, and of
        lesions that were left out. Raises InputError for a table, row or photo that cannot be used, and if pandas is
        not installed.
        """
        require("predict_table", "pandas")
        folder = None if photos is None else expanded(photos)
        if isinstance(table, str | os.PathLike):
            given = read_input([expanded(table)], self._run, photos=folder, invalid=invalid)
        else:
            given = read_lesions(table_of_frame(table), [folder or Path()], self._run, invalid)
        predictor, transforms, lesions = self.predictor, self._transforms(tta), given.lesions
        predictor.prepare(len(lesions), transforms)
        tables, left_out, changes = [], [*given.problems], Counter[str]()
        size = BATCHES * predictor.batch  # limits the memory for the features of all networks
        for start in range(0, len(lesions), size):
            part = lesions.take(slice(start, start + size))
            predictions = predictor.predict(part, transforms, drop=invalid == "drop")
            tables.append(predictor.table(predictions))
            left_out += predictions.problems.values()
            changes += predictions.changes
        notes = [*given.notes, *self._run.notes_on_training(lesions.lesion_ids), *describe_changes(changes)]
        for note in (*notes, *(f"left out: {problem}" for problem in left_out)):
            warnings.warn(note, stacklevel=2)
        return pa.concat_tables(tables).to_pandas()

    def explain(
        self,
        clinical: Photo | None = None,
        dermoscopic: Photo | None = None,
        *,
        concepts: Mapping[str, float | str | None] | None = None,
        lesion_id: str = ID,
        **fields: Any,
    ) -> dict[str, AttentionMaps]:
        """Return the attention maps of one lesion by tri-modal model, the mean over its networks.

        The arguments are those of `predict`. `triderm_dist.report.attention.draw_attention` draws them. Raises
        InputError as `predict` does, and if no network of the run is tri-modal.
        """
        photos = self._one_lesion({"clinical": clinical, "dermoscopic": dermoscopic}, concepts, lesion_id, fields)
        maps = self.predictor.attention(photos)
        if not maps:
            raise InputError(f"{self.folder}: only trimodal networks have attention maps, and this run has none")
        return maps

    def networks(self, model: str | None = None, fold: int | None = None) -> list[PixelNetwork]:
        """Load networks of the run as plain modules, with their preprocessing; None takes all models, or all folds.

        fold: its number; a refit has one network per model, number 0. Raises InputError for an unknown model or fold,
        and for damaged weights.
        """
        known = self._run.networks
        if model is not None and model not in known:
            raise InputError(f"model={model}: {did_you_mean(model, known)}")
        loader = NetworkLoader(self._run, choose_device(self._device))
        found = []
        for name in known if model is None else [model]:
            if fold is not None and fold not in range(len(known[name])):
                raise InputError(f"fold={fold}: {name} has the folds 0 to {len(known[name]) - 1}")
            loaded = loader.load(name, share=False)
            folds = range(len(loaded.networks)) if fold is None else [fold]
            found += [
                PixelNetwork(name, each, loaded.networks[each], loaded.preprocessing, self._run) for each in folds
            ]
        return found

    def export(
        self,
        output: str | os.PathLike[str],
        format: Format = "zip",
        *,
        models: Sequence[str] | None = None,
        folds: Sequence[int] | None = None,
        license: str = "other",
    ) -> None:
        """Write the run as a zip file or a folder for the hub, or its networks as ONNX or torch.export files.

        See `triderm export --help`. Raises InputError if the output exists, or a file would not be exact.
        """
        from triderm_dist.inference.export import export_run

        check_choice("format", format, get_args(Format))
        networks: Networks = "refit" if self._run.refitted and format in ("onnx", "torch_export") else "folds"
        export_run(
            self.folder, Path(output).expanduser(), format, networks=networks, models=models, folds=folds,
            license_name=license, report=lambda line: None,
        )  # fmt: skip

    def _transforms(self, tta: int | None) -> int:
        if tta not in (None, 1, 2, 4, 8):
            raise InputError(f"tta={tta}: must be 1, 2, 4 or 8 transforms")
        return tta or self._run.experiment.predict.transforms

    def _prediction(self, predictions: EnsemblePredictions, notes: Iterable[str]) -> Prediction:
        """Return the prediction for one lesion."""
        names = self.diagnoses

        def by_name(values: np.ndarray) -> dict[str, Any]:
            return dict(zip(names, values.tolist(), strict=True))

        decisions = by_name(predictions.results.decisions[0])
        decided = tuple(name for name in names if decisions[name])
        return Prediction(
            lesion_id=predictions.results.lesion_ids[0],
            probabilities=by_name(predictions.results.probabilities[0]),
            diagnosis=decided[0] if self._run.fitted.ensemble.rule == "nearest" else decided,
            decisions=decisions,
            members={name: by_name(values[0]) for name, values in zip(self.members, predictions.members, strict=True)},
            warnings=tuple(notes),
        )

    # --- one lesion ---

    def _one_lesion(
        self,
        photos: Mapping[str, Photo | None],
        concepts: Mapping[str, float | str | None] | None,
        lesion_id: str,
        fields: Mapping[str, Any],
    ) -> PhotoSet:
        task = self.task
        given = {
            view: Path(photo).expanduser() if isinstance(photo, str | os.PathLike) else photo
            for view, photo in photos.items()
            if photo is not None
        }
        for view, photo in given.items():
            if view not in self.views:
                raise InputError(f"{view}: task {task.name!r} has no such photo; it has {', '.join(self.views)}")
            if isinstance(photo, Path) and not photo.is_file():
                raise InputError(f"{view}: {photo}: {why_no_file(photo)}")
        return photo_set(
            self._run,
            {view: [given.get(view)] for view in self.views},
            lesion_ids=[lesion_id],
            metadata=np.array([self._metadata(fields)], np.float32),
            concept_scores=np.array([self._scores({} if concepts is None else concepts)], np.float32),
        )

    def _metadata(self, given: Mapping[str, Any]) -> list[float]:
        """Parse metadata by the names of fields or of their columns, in any case."""
        spelled = {spelling.lower(): each for each in self.fields for spelling in (each.column, each.name)}
        values = dict.fromkeys(spelled.values(), float("nan"))
        seen: dict[MetadataField, str] = {}
        for name, value in given.items():
            if (field := spelled.get(name.lower())) is None:
                known = [*(each.name for each in self.fields), *self.views, "concepts", "lesion_id", "tta"]
                raise InputError(f"{name}: no field of task {self.task.name!r}; {did_you_mean(name, known)}")
            if seen.setdefault(field, name) != name:
                raise InputError(f"{name}: given twice, also as {seen[field]}; remove one")
            try:
                values[field] = parse_field(field, text_of(value), self.task.missing_words)
            except ValueError as error:
                raise InputError(f"{name}: {error}; leave it out if unknown") from None
        return [values[each] for each in self.fields]

    def _scores(self, given: Mapping[str, float | str | None]) -> list[float]:
        if not isinstance(given, Mapping):
            raise InputError(f"concepts: must be {{name: score}}, not {type(given).__name__}")
        prefix = self.task.concepts.prefix or ""
        spelled = {name.lower(): name for name in self.concepts}
        scores = dict.fromkeys(self.concepts, float("nan"))
        for key, value in given.items():
            name = spelled.get(key.lower()) or spelled.get(key.lower().removeprefix(prefix.lower()))
            if name is None:
                hint = did_you_mean(key, self.concepts) if self.concepts else "the task has none"
                raise InputError(f"concepts: unknown concept {key!r}; {hint}")
            try:
                scores[name] = parse_score(key, text_of(value), self.task)
            except ValueError as error:
                raise InputError(f"concepts: {error}; leave it out if unknown") from None
        return list(scores.values())

    def _warnings(self, photos: PhotoSet) -> Iterator[str]:
        """Yield reasons why a prediction may be less reliable than those on which the run was scored."""
        for view, (photo,) in photos.photos.items():
            if photo is None:
                yield f"no {view} photo"
                continue
            size, least = _size(photo), min(self._run.canvas) // 2
            if size and min(size) < least:
                yield f"the {view} photo is only {size[0]} x {size[1]} pixels; the run was trained on larger ones"
        if not photos.view_present.any():
            yield "no photo at all: no network was trained on such lesions"
        missing = np.isnan(photos.metadata[0])
        if missing.any():
            yield f"missing: {', '.join(each.label for each, gap in zip(self.fields, missing, strict=True) if gap)}"
        if gaps := int(np.isnan(photos.concept_scores).sum()):
            yield f"missing: {gaps} of {len(self.concepts)} concept scores"
        for field, value, seen in zip(self.fields, photos.metadata[0].tolist(), self._seen, strict=True):
            if seen is None or math.isnan(value):
                continue
            if field.is_number and not seen.min() <= value <= seen.max():
                within = f"{field.show(seen.min())} to {field.show(seen.max())}"
                yield f"{field.label} {field.show(value)} is outside of what the run was trained on, {within}"
            elif not field.is_number and value not in seen:
                yield f"{field.label} {field.show(value)} is in no lesion that the run was trained on"

    @cached_property
    def _seen(self) -> list[np.ndarray | None]:
        """The distinct values of each field in the training set; None if the run does not record them."""
        return read_seen(self.folder, self.fields)


@dataclass(frozen=True)
class PixelNetwork:
    """One trained network as a plain module.

    network: `network(clinical, dermoscopic, view_present, concepts, metadata)` takes pixels (B, 3, S, S) of both views
    as `preprocess` gives them ((B, 0) for a view that the task lacks), view_present (B, 2) bool, and concepts (B, K)
    and metadata (B, M) in the order of `signature`, NaN where missing; it returns `Outputs`, whose logits (B, C) are
    not calibrated. In evaluation mode, on the device of the run.
    """

    model: str
    fold: int
    network: Network
    preprocessing: Preprocessing
    run: RunFolder

    @property
    def signature(self) -> Signature:
        """Names of the diagnoses, views and concepts, and the fields."""
        return self.run.signature

    def preprocess(self, photo: Photo) -> Tensor:
        """Return the pixels (3, S, S) of a photo, prepared as those of the training. Raises InputError."""
        view = self.signature.views[0]
        try:
            pixels, _ = photo_set(self.run, {view: [photo]}).pixels(0, view)
        except PhotoError as error:
            raise InputError(f"the photo cannot be read ({error})") from None
        width, height = self.run.canvas
        return self.preprocessing(torch.from_numpy(fit_to_canvas(pixels, height, width).copy())[None])[0]


def _size(photo: Photo) -> tuple[int, int] | None:
    """Return (width, height) of a photo from its header, None if it has none that can be read."""
    if isinstance(photo, Image.Image):
        return photo.size
    try:
        with Image.open(io.BytesIO(photo) if isinstance(photo, bytes) else photo) as image:  # type: ignore[arg-type]
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # reading it raises later
