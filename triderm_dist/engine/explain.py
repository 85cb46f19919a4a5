"""What the fold models of a tri-modal network saw in given lesions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from triderm_dist.config import Experiment
from triderm_dist.data.loader import Loader, PhotoSource, ViewSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.format import INDEX
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import is_url, open_index
from triderm_dist.distributed import collectives, parallel
from triderm_dist.engine.checkpoint import load_weights
from triderm_dist.engine.fold import assigned_folds, new_network
from triderm_dist.engine.views import open_views
from triderm_dist.losses import Head, probabilities
from triderm_dist.models import build_towers
from triderm_dist.models.attention import AttentionMaps, semantic_values
from triderm_dist.models.trimodal import TriModal
from triderm_dist.predictions import NO_FOLD
from triderm_dist.schema import VIEWS, Batch, ConfigError, DataError


def attention_maps(experiment: Experiment, lesion_ids: Sequence[str]) -> Iterator[tuple[str, AttentionMaps]]:
    """(model, what it saw) for each tri-modal model and each lesion, which are sought in the test and training shards.

    A test lesion is seen by the models of all folds (mean), a lesion of the training set by the one of its own fold,
    which never trained on it. In one process. Raises DataError for a lesion that no set has or a fold that is not
    trained, ConfigError where no model attends.
    """
    names = [name for name, model in experiment.models.items() if model.kind == "trimodal"]
    if not names:
        raise ConfigError("explain: only trimodal networks attend, and these settings have none")
    left = list(lesion_ids)
    for where, test in ((experiment.test_shards, True), (experiment.train_shards, False)):
        if not left or not (is_url(where) or (Path(where) / INDEX).exists()):
            continue
        index = open_index(where, experiment.data.remote)
        position = {str(lesion): row for row, lesion in enumerate(index.lesion_ids)}
        rows = [position[lesion] for lesion in left if lesion in position]
        left = [lesion for lesion in left if lesion not in position]
        for name in names if rows else ():
            for maps in _attention_maps(experiment, index, name, rows, test):
                yield name, maps
    if left:
        raise DataError(f"explain={left[0]}: no lesion of the packed sets has this id; samples.parquet lists them")


def _attention_maps(
    experiment: Experiment, index: ShardIndex, name: str, rows: Sequence[int], test: bool
) -> Iterator[AttentionMaps]:
    model = experiment.models[name]
    accelerator = parallel.start("fp32", 1, collectives.world_size(), 1.0)
    views = open_views(
        model, index, experiment.token_folder, accelerator, experiment.data, seed=experiment.seed_of_tokens, train=False
    )
    tower = build_towers(model.tower.model_copy(update={"pretrained": False}))[0]
    photos = PhotoSource(index, tower.image_size, (0.0,) * 3, (1.0,) * 3)
    networks: dict[int, TriModal] = {}

    def network_of(fold: int) -> TriModal:
        if fold not in networks:
            folder = experiment.fold_folder(name, fold)
            if not (folder / "fold.json").exists():
                raise DataError(f"{folder}: this fold is not trained; run triderm crossval first")
            network = new_network(model, index.concepts, views, pretrained=False)
            load_weights(folder / "weights", network)
            networks[fold] = network.to(accelerator.device).eval()  # type: ignore[assignment]
        return networks[fold]

    own_fold = np.full(len(index), NO_FOLD) if test else assigned_folds(index, experiment.data)
    for row in rows:
        batch, pixels = (_batch(index, source, row, accelerator.device) for source in (views.source, photos))
        folds = range(experiment.data.folds) if own_fold[row] == NO_FOLD else [int(own_fold[row])]
        seen = [_look(network_of(fold), batch, model.head) for fold in folds]
        semantic = network_of(folds[0]).semantic

        def mean(part: str, seen: list[dict[str, torch.Tensor]] = seen) -> np.ndarray:
            return torch.stack([one[part] for one in seen]).mean(0).cpu().numpy()

        present = [view for view, there in zip(VIEWS, batch.view_present[0].tolist(), strict=True) if there]
        yield AttentionMaps(
            lesion_id=str(index.lesion_ids[row]),
            label=int(index.labels[row]),
            photos={view: getattr(pixels, view)[0].permute(1, 2, 0).cpu().numpy() for view in present},
            attention={view: mean(view) for view in present if view in seen[0]},
            semantic=dict(zip(semantic.names, mean("semantic").tolist(), strict=True)) if semantic else {},
            values=semantic_values(index.concepts, index.concept_scores[row], index.metadata[row]),
            probabilities=mean("probabilities"),
            models=len(seen),
        )


def _batch(index: ShardIndex, source: ViewSource, row: int, device: torch.device) -> Batch:
    """One lesion as the network, or with a source of plain photos the reader, sees it."""
    rows = np.array([row])
    plan = EpochPlan(Samples.of(index, rows), Sampling("sequential"), seed=0, epoch=0)
    return next(iter(Loader(index, source, plan.batches(0, 1, 1), 1, device))).micro_batches[0]


@torch.no_grad()
def _look(network: TriModal, batch: Batch, head: Head) -> dict[str, torch.Tensor]:
    """The probabilities (C,) of the only lesion of a batch, and the parts of its attention that there are."""
    inputs = (batch.clinical, batch.dermoscopic, batch.view_present, batch.concepts, batch.metadata)
    parts = {name: part[0] for name, part in network.attention(*inputs)._asdict().items() if part is not None}
    return {**parts, "probabilities": probabilities(network(*inputs).logits, head)[0]}
