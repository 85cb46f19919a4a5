"""Predict photos with all networks of a run.

Every photo is read and decoded once. Inputs that networks share are computed once: pixels at a tower's size, tokens of
a frozen tower, and the output of frozen blocks that all folds share.

Shapes: N lesions, B of a batch, V views, M members of the ensemble, C diagnoses, E width of embeddings.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from triderm_dist.data.augment import LesionRng, dihedral
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_set import PhotoSet, PhotoSetSource
from triderm_dist.data.problems import Problem
from triderm_dist.data.view_source import Fetched
from triderm_dist.distributed.out_of_memory import with_smaller_batches
from triderm_dist.engine.evaluate import Evaluation, mean_outputs
from triderm_dist.engine.explain import maps_of
from triderm_dist.engine.fold import as_predictions
from triderm_dist.inference.networks import (
    Device,
    LoadedModel,
    NetworkLoader,
    Precision,
    Preprocessing,
    choose_device,
)
from triderm_dist.inference.run_folder import RunFolder, open_run_folder
from triderm_dist.models.attention import AttentionMaps
from triderm_dist.models.trimodal import TriModal
from triderm_dist.predictions import NO_FOLD, Predictions, average_test
from triderm_dist.schema import VIEWS, Batch, Outputs
from triderm_dist.submission import Results, results_table


class EnsemblePredictions(NamedTuple):
    """The ensemble's predictions for N lesions.

    members: (M, N, C) probabilities.  parts: the outputs of every network.  problems: by row, photos that could not be
    read and count as black.  changes: the number of photos by what was converted in them.
    """

    results: Results
    members: np.ndarray
    parts: list[Predictions]
    problems: dict[int, Problem]
    changes: Counter[str]


class Predictor:
    """The networks and the ensemble of a run, loaded once; safe to use from several threads.

    device: such as `cpu` or `cuda:1`; None takes the GPU if there is one.  precision: None takes that of each model's
    settings.  batch: lesions in a forward pass, None takes `predict.batch` of the run; fewer where memory runs out.
    """

    def __init__(
        self,
        run: RunFolder | Path,
        *,
        device: Device | None = None,
        precision: Precision | None = None,
        batch: int | None = None,
    ) -> None:
        """Load all networks. Raises InputError if the run is incomplete, damaged or of another version."""
        self.run = run if isinstance(run, RunFolder) else open_run_folder(run)
        self.device = choose_device(device)
        self.batch = self._fitting_batch = batch or self.run.experiment.predict.batch
        self._loader = NetworkLoader(self.run, self.device, precision)
        self.models = [self._loader.load(name) for name in self.run.networks]
        self.embedding = self._loader.load_embedding()
        self._combining = threading.Lock()

    @property
    def members(self) -> tuple[str, ...]:
        return self.run.fitted.members

    def prepare(self, lesions: int, transforms: int, report: Callable[[str], None] = lambda line: None) -> None:
        """Use faster backends for frozen towers on a CPU from now on, if there are enough lesions to save time.

        Probabilities change only by rounding (see `models.cpu_tower`). report: called with a line per tower.
        """
        self._loader.prepare(lesions * transforms * len(self.run.signature.views), report)

    def predict(self, photos: PhotoSet, transforms: int, drop: bool = False) -> EnsemblePredictions:
        """Predict lesions of different ids by every network, averaged over transforms of the dihedral group, and
        combine them by stacker and ensemble.

        transforms: 1, 2, 4 or 8, the first of the 8.  drop: see `PhotoSetSource`. Raises DataError for a photo that
        cannot be read.
        """

        def outputs_of(batch: int) -> tuple[_Canvases, dict[tuple[str, int], list[np.ndarray]], np.ndarray | None]:
            source = _Canvases(photos, drop)
            return source, *self._outputs(photos, source, transforms, batch)

        found, self._fitting_batch = with_smaller_batches(
            outputs_of, self._fitting_batch, "predict.batch", collective=False
        )
        source, outputs, embeddings = found
        parts = []
        for model in self.models:
            for number, trained in enumerate(model.trained):
                evaluation = Evaluation(np.arange(len(photos)), *outputs[model.name, number])
                head = model.config.head
                hashes = trained.weights, trained.refit_of
                parts.append(as_predictions(evaluation, photos, model.name, head, NO_FOLD, *hashes))
        with self._combining:
            results, members = self.run.fitted.predict(average_test(parts), parts, embeddings)
        changes = Counter(change for photo in source.changes.values() for change in photo)
        return EnsemblePredictions(results, members, parts, dict(sorted(source.problems.items())), changes)

    def table(self, predictions: EnsemblePredictions) -> pa.Table:
        """Return the `results_table` of predictions, without the lesions that have a problem."""
        by_member = dict(zip(self.members, predictions.members, strict=True))
        table = results_table(predictions.results, by_member, self.run.task.diagnosis_names)
        return table.filter(np.isin(np.arange(len(table)), list(predictions.problems), invert=True))

    @torch.no_grad()
    def attention(self, photos: PhotoSet) -> dict[str, AttentionMaps]:
        """Return the attention maps of one lesion by tri-modal model, the mean over its networks."""
        source = _Canvases(photos, drop=False)
        step = next(iter(LoaderFactory(photos, source, 1, 1).sequential(np.arange(1), 1, self.device)))
        batch = step.micro_batches[0]
        pixels, maps = _Pixels({view: getattr(batch, view) for view in source.views}), {}
        for model in self.models:
            networks = [network for network in model.networks if isinstance(network, TriModal)]
            if networks:
                images = self._inputs(model, batch, pixels, (0,), {})
                inputs = (*images, batch.view_present, batch.concepts, batch.metadata)
                shown = model.preprocessing._replace(mean=(0.0,) * 3, std=(1.0,) * 3)
                crops = {view: pixels.upright(shown, view)[0] for view in source.views}
                pairs = [(network, inputs) for network in networks]
                maps[model.name] = maps_of(pairs, model.config.head, photos, 0, crops)
        return maps

    @torch.no_grad()
    def _outputs(
        self, photos: PhotoSet, source: _Canvases, transforms: int, batch: int
    ) -> tuple[dict[tuple[str, int], list[np.ndarray]], np.ndarray | None]:
        """Return the mean outputs by model and fold, as `mean_outputs` has them, and the embeddings (N, E)."""
        steps = max(1, -(-len(photos) // batch))  # of equal size, so that little is padded
        settings = self.run.experiment.data
        loaders = LoaderFactory(photos, source, settings.workers, settings.prefetch)
        gathered: dict[tuple[str, int], list[list[np.ndarray]]] = defaultdict(list)
        embeddings = []
        for step in loaders.sequential(np.arange(len(photos)), -(-len(photos) // steps), self.device):
            canvases, count = step.micro_batches[0], step.count
            views = {view: getattr(canvases, view) for view in source.views}
            pixels = _Pixels(views)
            for key, means in self._means(canvases, pixels, transforms, batch).items():
                gathered[key].append([mean[:count].cpu().numpy() for mean in means])
            if embed := self.embedding:
                parts = [embed(pixels.upright(embed.preprocessing, view)) for view in views]
                embeddings.append(torch.cat(parts, 1)[:count].cpu().numpy())
        outputs = {
            key: [np.concatenate(part) for part in zip(*batches, strict=True)] for key, batches in gathered.items()
        }
        return outputs, np.concatenate(embeddings) if self.embedding else None

    def _means(
        self, batch: Batch, pixels: _Pixels, transforms: int, largest: int
    ) -> dict[tuple[str, int], list[Tensor]]:
        """Return the outputs of all networks for a batch by model and fold, averaged over the transforms.

        Several transforms of a small batch pass a network at once, up to the `largest` batch.
        """
        at_once = max(1, min(transforms, largest // len(batch.lesion_ids)))
        outputs: dict[tuple[str, int], list[Outputs]] = defaultdict(list)
        for first in range(0, transforms, at_once):
            chosen = range(first, min(first + at_once, transforms))
            shared = [tensor.repeat(len(chosen), 1) for tensor in (batch.view_present, batch.concepts, batch.metadata)]
            encoded: dict[tuple[int, str], Tensor] = {}
            for model in self.models:
                device = self.device.type
                with torch.autocast(device, model.dtype or torch.bfloat16, enabled=model.dtype is not None):
                    inputs = self._inputs(model, batch, pixels, chosen, encoded)
                    for number, network in enumerate(model.networks):
                        outputs[model.name, number] += _split(network(*inputs, *shared), len(chosen))
        return {key: mean_outputs(each) for key, each in outputs.items()}

    def _inputs(
        self,
        model: LoadedModel,
        batch: Batch,
        pixels: _Pixels,
        transforms: Sequence[int],
        encoded: dict[tuple[int, str], Tensor],
    ) -> list[Tensor]:
        """Return the clinical and dermoscopic input of a model's networks, B lesions for each of the transforms.

        encoded: outputs of encoders so far, which models may share.
        """
        inputs = []
        for view in VIEWS:
            if view not in pixels.canvases:
                inputs.append(getattr(batch, view).repeat(len(transforms), 1))
                continue
            encoder = model.encoders.get(view)
            if encoder is None:
                inputs.append(pixels.transformed(model.preprocessing, view, transforms))
                continue
            if (id(encoder), view) not in encoded:
                encoded[id(encoder), view] = encoder(pixels.transformed(model.preprocessing, view, transforms))
            inputs.append(encoded[id(encoder), view])
        return inputs


class _Canvases(PhotoSetSource):
    """The photos of a set on its canvas, (B, H, W, 3) uint8, for networks of any preprocessing."""

    def __init__(self, photos: PhotoSet, drop: bool) -> None:
        super().__init__(photos, 1, (0.0,) * 3, (1.0,) * 3, drop=drop)

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, Tensor]:
        with self.uploaded(fetched, device) as photos:
            return {view: photo.clone() for view, photo in zip(self.views, photos, strict=True)}


class _Pixels:
    """The pixels of a batch's canvases, by view, for each preprocessing and transform; computed when first needed."""

    def __init__(self, canvases: dict[str, Tensor]) -> None:
        self.canvases = canvases
        self._upright: dict[tuple[Preprocessing, str], Tensor] = {}
        self._transformed: dict[tuple[Preprocessing, str], tuple[Sequence[int], Tensor]] = {}

    def upright(self, preprocessing: Preprocessing, view: str) -> Tensor:
        key = preprocessing, view
        if key not in self._upright:
            self._upright[key] = preprocessing(self.canvases[view], view)
        return self._upright[key]

    def transformed(self, preprocessing: Preprocessing, view: str, transforms: Sequence[int]) -> Tensor:
        """Return the pixels under each transform, one after the other, (len(transforms) * B, 3, size, size)."""
        key = preprocessing, view
        if key not in self._transformed or self._transformed[key][0] != transforms:
            upright = self.upright(preprocessing, view)
            transformed = torch.cat([dihedral(upright, each) for each in transforms])
            self._transformed[key] = transforms, transformed.contiguous(memory_format=torch.channels_last)
        return self._transformed[key][1]


def _split(outputs: Outputs, parts: int) -> list[Outputs]:
    """Split the outputs of `parts` batches that were computed together."""
    columns = [[None] * parts if tensor is None else tensor.chunk(parts) for tensor in outputs]
    return [Outputs(*part) for part in zip(*columns, strict=True)]
