"""Attention maps of the fold models of tri-modal networks for given lesions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from triderm_dist.config import Experiment
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.format import INDEX
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import is_url, open_index
from triderm_dist.distributed import parallel
from triderm_dist.engine.evaluate import network_inputs
from triderm_dist.engine.fold import assigned_folds, load_network, model_config, trained_fold
from triderm_dist.engine.model_inputs import ModelInputs, open_inputs
from triderm_dist.engine.model_tower import recorded_tower
from triderm_dist.losses import HeadKind, probabilities
from triderm_dist.models import network_class
from triderm_dist.models.attention import AttentionMaps, semantic_values
from triderm_dist.models.tower_record import TowerRecord
from triderm_dist.models.trimodal import TriModal
from triderm_dist.predictions import NO_FOLD, rows_of
from triderm_dist.schema import VIEWS, Batch, ConfigError, DataError, Task


def attention_maps(experiment: Experiment, lesion_ids: Sequence[str]) -> Iterator[tuple[str, Task, AttentionMaps]]:
    """Yield (model, task, attention maps) for each tri-modal model and each lesion of the test and training shards.

    Maps of a test lesion are the mean over the models of all folds; maps of a training lesion are from the model of the
    fold that holds it out. Call in one process. Raises DataError for a lesion that is in neither set or a fold that is
    not trained, ConfigError if no model is tri-modal.
    """
    names = tri_modal_models(experiment)
    if not names:
        raise ConfigError("explain: only trimodal networks have attention maps, and these settings have none")
    remaining = list(lesion_ids)
    for shards, test in ((experiment.test_shards, True), (experiment.train_shards, False)):
        if not remaining or not (is_url(shards) or (Path(shards) / INDEX).exists()):
            continue
        index = open_index(shards, experiment.data.remote)
        found = rows_of(remaining, index.lesion_ids.column).tolist()
        rows = [row for row in found if row >= 0]
        remaining = [lesion for lesion, row in zip(remaining, found, strict=True) if row < 0]
        for name in names if rows else ():
            for maps in _attention_maps(experiment, index, name, rows, test):
                yield name, index.task, maps
    if remaining:
        raise DataError(f"explain={remaining[0]}: no lesion of the packed sets has this id; samples.parquet lists them")


def tri_modal_models(experiment: Experiment) -> list[str]:
    """Return the names of the models that have attention maps."""
    return [
        name for name in experiment.models if issubclass(network_class(model_config(experiment, name).kind), TriModal)
    ]


def out_of_fold_attention(experiment: Experiment, lesion_ids: Sequence[str]) -> dict[str, AttentionMaps]:
    """Return {lesion id: attention maps} of training lesions, each from the fold's model that holds it out.

    Uses the first tri-modal model; returns {} without one. Raises as `attention_maps`.
    """
    names = tri_modal_models(experiment)
    if not names or not lesion_ids:
        return {}
    index = open_index(experiment.train_shards, experiment.data.remote)
    rows = rows_of(lesion_ids, index.lesion_ids.column).tolist()
    if -1 in rows:
        raise DataError(f"{experiment.train_shards}: has no lesion {lesion_ids[rows.index(-1)]}; pack its data again")
    return {maps.lesion_id: maps for maps in _attention_maps(experiment, index, names[0], rows, test=False)}


def _attention_maps(
    experiment: Experiment, index: ShardIndex, name: str, rows: Sequence[int], test: bool
) -> Iterator[AttentionMaps]:
    """Yield the attention maps of one model for index rows, which are grouped by fold."""
    model = experiment.models[name]
    accelerator = parallel.start_inference("fp32")
    device = accelerator.device
    own_fold = np.full(len(index), NO_FOLD) if test else assigned_folds(index, experiment.data)
    all_folds = range(experiment.data.folds)
    folds_of = {row: all_folds if own_fold[row] == NO_FOLD else [int(own_fold[row])] for row in rows}
    recorded: dict[int, TowerRecord | None] = {}
    for fold in sorted({fold for folds in folds_of.values() for fold in folds}):
        folder = experiment.fold_folder(name, fold)
        trained, index = trained_fold(folder, index)
        recorded[fold] = trained.tower
    model_inputs: dict[TowerRecord | None, ModelInputs] = {}
    for record in recorded.values():
        if record not in model_inputs:
            model_inputs[record] = open_inputs(
                experiment, model, index, accelerator, recorded_tower(experiment, model, record)
            )
    networks: dict[int, TriModal] = {}
    for row, folds in sorted(folds_of.items(), key=lambda item: list(item[1])):
        networks = {fold: network for fold, network in networks.items() if fold in folds}  # frees the others
        batches = {each: _batch(model_inputs[each].loaders, row, device) for each in {recorded[fold] for fold in folds}}
        for fold in folds:
            if fold not in networks:
                network = load_network(model, model_inputs[recorded[fold]], experiment.fold_folder(name, fold))
                networks[fold] = network.eval().to(device)  # type: ignore[assignment]
        pixels = _batch(_photos(index, model_inputs[recorded[folds[0]]].tower), row, device)
        inputs = [(networks[fold], network_inputs(batches[recorded[fold]])) for fold in folds]
        yield maps_of(inputs, model.head, index, row, {view: getattr(pixels, view)[0] for view in VIEWS})


def maps_of(
    networks: Sequence[tuple[TriModal, Sequence[torch.Tensor]]],
    head: HeadKind,
    index: ShardIndex | PhotoSet,
    row: int,
    pixels: Mapping[str, torch.Tensor],
) -> AttentionMaps:
    """Return the mean attention of networks for the lesion in an index row.

    networks: each with the five inputs of its `forward` for a batch of that lesion.  pixels: (3, S, S) in [0, 1] by
    view, the crops that the networks see; missing views are not read.
    """
    outputs = [_attend(network, inputs, head) for network, inputs in networks]
    mean = {part: torch.stack([output[part] for output in outputs]).mean(0).cpu().numpy() for part in outputs[0]}
    semantic = networks[0][0].semantic
    rows = np.array([row])
    present = [view for view, has in zip(VIEWS, index.inputs(rows).view_present[0].tolist(), strict=True) if has]
    return AttentionMaps(
        lesion_id=str(index.lesion_ids[row]),
        label=int(index.labels[row]),
        photos={view: pixels[view].permute(1, 2, 0).cpu().numpy() for view in present},
        attention={view: mean[view] for view in present if view in mean},
        semantic=dict(zip(semantic.names, mean["semantic"].tolist(), strict=True)) if semantic else {},
        values=semantic_values(index.concepts, index.concept_scores[row], index.task.fields, index.metadata[row]),
        probabilities=mean["probabilities"],
        models=len(outputs),
        diagnoses=index.diagnoses,
    )


def _photos(index: ShardIndex, tower: TowerRecord) -> LoaderFactory:
    """Return loaders of the photos at the size of the model's tower, with pixels in [0, 1]."""
    return LoaderFactory(index, PhotoSource(index, tower.image_size, (0.0,) * 3, (1.0,) * 3, frame=tower.frame))


def _batch(loaders: LoaderFactory, row: int, device: torch.device) -> Batch:
    """Return a batch of the lesion in one index row."""
    return next(iter(loaders.sequential(np.array([row]), 1, device))).micro_batches[0]


@torch.no_grad()
def _attend(network: TriModal, inputs: Sequence[torch.Tensor], head: HeadKind) -> dict[str, torch.Tensor]:
    """Return the probabilities (C,) and the attention maps of one lesion; parts without attention are omitted."""
    parts = {name: part[0] for name, part in network.attention(*inputs)._asdict().items() if part is not None}
    return {**parts, "probabilities": probabilities(network(*inputs).logits, head)[0]}
