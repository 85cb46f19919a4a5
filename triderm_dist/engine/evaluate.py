"""Network outputs for given lesions, gathered from all ranks and equal to the outputs of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.data.loader import LoaderFactory
from triderm_dist.schema import VIEWS, Batch, Outputs


@dataclass
class Evaluation:
    """Network outputs in the order of `rows` (N,): logits, aux_clinical, aux_dermoscopic (N, C), features (N, D),
    float32; NaN for the auxiliary logits of a view that the task lacks.
    """

    rows: np.ndarray
    logits: np.ndarray
    aux_clinical: np.ndarray
    aux_dermoscopic: np.ndarray
    features: np.ndarray


def forward(network: nn.Module, batch: Batch) -> Outputs:
    """Run the network on a batch."""
    return network(batch.clinical, batch.dermoscopic, batch.view_present, batch.concepts, batch.metadata)


def hide_view(batch: Batch, view: str, concepts: Sequence[str]) -> Batch:
    """Return the batch with one view treated as missing: neither its photo nor the concept scores derived from it."""
    present, scores = batch.view_present.clone(), batch.concepts.clone()
    present[:, VIEWS.index(view)] = False
    scores[:, [name.startswith(f"{view}/") for name in concepts]] = torch.nan
    return replace(batch, view_present=present, concepts=scores)


def mean_outputs(outputs: Sequence[Outputs]) -> list[torch.Tensor]:
    """Average a network's outputs for a batch over the transforms, in float32: logits, aux_clinical, aux_dermoscopic
    (B, C), NaN for the auxiliary logits of a view that the task lacks, and features (B, D).
    """
    absent = torch.full_like(outputs[0].logits, torch.nan)
    return [
        absent if parts[0] is None else torch.stack([part.float() for part in parts]).mean(0)
        for parts in zip(*outputs, strict=True)
    ]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loaders: LoaderFactory,
    rows: np.ndarray,
    accelerator: Accelerator,
    *,
    micro_batch: int,
    transforms: int = 1,
    after_batch: Callable[[], None] = lambda: None,
    hide: str | None = None,
) -> Evaluation:
    """Average the outputs for index `rows` (N,) over the first `transforms` transforms of the dihedral group.

    Photos are decoded once; one forward per transform gives features and all logits. Batches keep one static shape:
    the last one is padded, and padding is removed by row number. Call on all ranks. `after_batch` is called on all
    ranks after every batch, and may raise. `hide` names a view to treat as missing (see `hide_view`).
    """
    network.eval()
    index, device = loaders.index, accelerator.device
    position = {int(row): i for i, row in enumerate(rows)}
    loader = loaders.sequential(
        rows, micro_batch, device, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    arrays: list[np.ndarray] = []
    for step in loader:
        batch = step.micro_batches[0]
        if hide:
            batch = hide_view(batch, hide, index.concepts)
        means = mean_outputs(
            [forward(network, loaders.source.transformed(batch, step.rows, k)) for k in range(transforms)]
        )
        row_numbers = torch.from_numpy(step.rows).to(device)
        gathered = accelerator.gather((row_numbers, batch.valid, *means))
        seen, valid, *values = [tensor.cpu().numpy() for tensor in gathered]
        positions = np.array([position[int(row)] for row in seen[valid]], np.int64)
        arrays = arrays or [np.full((len(rows), value.shape[1]), np.nan, np.float32) for value in values]
        for array, value in zip(arrays, values, strict=True):
            array[positions] = value[valid]
        after_batch()
    return Evaluation(rows, *arrays)
