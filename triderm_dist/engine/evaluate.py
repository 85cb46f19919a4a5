"""Outputs of a network for given lesions, gathered from all ranks and equal to what one process computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.data.loader import Loader, ViewSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.schema import VIEWS, Batch, Outputs


@dataclass
class Evaluation:
    """Network outputs in the order of `rows` (N,): logits, aux_clinical, aux_dermoscopic (N, C), features (N, D),
    float32.
    """

    rows: np.ndarray
    logits: np.ndarray
    aux_clinical: np.ndarray
    aux_dermoscopic: np.ndarray
    features: np.ndarray


def forward(network: nn.Module, batch: Batch) -> Outputs:
    return network(batch.clinical, batch.dermoscopic, batch.view_present, batch.concepts, batch.metadata)


def without(batch: Batch, view: str, concepts: Sequence[str]) -> Batch:
    """The batch of the same lesions if one view had never been taken: no photo, no concept score of it."""
    present, scores = batch.view_present.clone(), batch.concepts.clone()
    present[:, VIEWS.index(view)] = False
    scores[:, [name.startswith(f"{view}/") for name in concepts]] = torch.nan
    return replace(batch, view_present=present, concepts=scores)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    index: ShardIndex,
    source: ViewSource,
    rows: np.ndarray,
    accelerator: Accelerator,
    *,
    micro_batch: int,
    transforms: int = 1,
    workers: int = 2,
    prefetch: int = 4,
    between: Callable[[], None] = lambda: None,
    hide: str | None = None,
) -> Evaluation:
    """Mean outputs of `rows` over the first `transforms` transforms of the dihedral group: photos are decoded once, and
    one forward for each gives features and all logits.

    Batches keep one static shape: the last one is padded, and what the padding doubled is removed by row number.
    `between` is called on all ranks after every batch, and may raise. `hide` treats one view as missing: its photo and
    the concept scores that were read off it.
    """
    network.eval()
    position = {int(row): i for i, row in enumerate(rows)}
    world = accelerator.num_processes
    plan = EpochPlan(Samples.of(index, rows), Sampling("sequential"), seed=0, epoch=0)
    batches = plan.batches(accelerator.process_index, world, micro_batch * world)
    loader = Loader(index, source, batches, micro_batch, accelerator.device, workers=workers, prefetch=prefetch)
    arrays: list[np.ndarray] = []
    for step in loader:
        batch = step.micro_batches[0]
        if hide:
            batch = without(batch, hide, index.concepts)
        outputs = [forward(network, source.transformed(batch, step.rows, transform)) for transform in range(transforms)]
        means = [torch.stack([part.float() for part in parts]).mean(0) for parts in zip(*outputs, strict=True)]
        numbers = torch.from_numpy(step.rows).to(accelerator.device)
        gathered = accelerator.gather((numbers, batch.valid, *means))
        seen, valid, *values = [tensor.cpu().numpy() for tensor in gathered]
        places = np.array([position[int(row)] for row in seen[valid]], np.int64)
        arrays = arrays or [np.full((len(rows), value.shape[1]), np.nan, np.float32) for value in values]
        for array, value in zip(arrays, values, strict=True):
            array[places] = value[valid]
        between()
    return Evaluation(rows, *arrays)
