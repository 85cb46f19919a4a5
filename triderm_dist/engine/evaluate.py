"""Network outputs for given lesions, gathered from all ranks and equal to the outputs of one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.data.augment import to_device
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.upload import HostCopy
from triderm_dist.distributed.heartbeat import note_progress
from triderm_dist.models.network import Network
from triderm_dist.schema import VIEWS, Batch, Outputs

INPUTS = (*VIEWS, "concepts", "metadata")
"""What a network reads of a lesion, as `models.NAME.use` names it."""


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


def hide_input(batch: Batch, name: str, concepts: Sequence[str]) -> Batch:
    """Return the batch with one input of `INPUTS` treated as missing.

    Of a view neither its photo nor the concept scores derived from it are left.  concepts: names of the K scores.
    """
    if name == "metadata":
        return replace(batch, metadata=torch.full_like(batch.metadata, torch.nan))
    if name == "concepts":
        return replace(batch, concepts=torch.full_like(batch.concepts, torch.nan))
    present = batch.view_present.clone()
    present[:, VIEWS.index(name)] = False
    derived = np.array([score.startswith(f"{name}/") for score in concepts], bool)
    scores = batch.concepts.masked_fill(to_device(derived, batch.concepts.device), torch.nan)
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


def evaluate(
    network: nn.Module,
    loaders: LoaderFactory,
    rows: np.ndarray,
    accelerator: Accelerator,
    *,
    micro_batch: int,
    transforms: int = 1,
    after_batch: Callable[[], None] = lambda: None,
    run: Callable[[nn.Module, Batch], Outputs] = forward,
) -> Evaluation:
    """Average the outputs for index `rows` (N,) over the first `transforms` transforms of the dihedral group.

    Photos are decoded once; one forward per transform gives features and all logits. Batches keep one static shape:
    the last one is padded, and padding is removed by row number. Call on all ranks. `after_batch` is called on all
    ranks after every batch, and may raise. `run` runs the network.
    """
    return evaluate_hidden(
        network, loaders, rows, accelerator, (None,),
        micro_batch=micro_batch, transforms=transforms, after_batch=after_batch, run=run,
    )[None]  # fmt: skip


@torch.no_grad()
def evaluate_hidden(
    network: nn.Module,
    loaders: LoaderFactory,
    rows: np.ndarray,
    accelerator: Accelerator,
    hidden: Sequence[str | None],
    *,
    micro_batch: int,
    transforms: int = 1,
    after_batch: Callable[[], None] = lambda: None,
    run: Callable[[nn.Module, Batch], Outputs] = forward,
) -> dict[str | None, Evaluation]:
    """Evaluate as `evaluate` does, with each of `hidden` treated as missing in turn (see `hide_input`); None: nothing.

    Photos are decoded once, and pass the towers of a `Network` once, for all of them.
    """
    network.eval()
    index, device = loaders.index, accelerator.device
    position = {int(row): i for i, row in enumerate(rows)}
    loader = loaders.sequential(
        rows, micro_batch, device, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    arrays: dict[str | None, list[np.ndarray]] = {}

    def keep(name: str | None, outputs: HostCopy) -> None:
        seen, valid, *values = outputs.arrays()
        positions = np.array([position[int(row)] for row in seen[valid]], np.int64)
        if name not in arrays:
            arrays[name] = [np.full((len(rows), value.shape[1]), np.nan, np.float32) for value in values]
        for array, value in zip(arrays[name], values, strict=True):
            array[positions] = value[valid]

    found: deque[tuple[str | None, HostCopy]] = deque()
    for step in loader:
        batch = step.micro_batches[0]
        outputs: dict[str | None, list[Outputs]] = {name: [] for name in hidden}
        for transform in range(transforms):
            one = loaders.source.transformed(batch, step.rows, transform)
            given: AbstractContextManager[None] = nullcontext()
            if len(hidden) > 1 and isinstance(network, Network):
                one, given = _encoded(network, one, accelerator), network.given_tokens()
            with given:
                for name in hidden:
                    outputs[name].append(run(network, hide_input(one, name, index.concepts) if name else one))
        row_numbers = to_device(step.rows, device)
        for name in hidden:
            gathered = accelerator.gather((row_numbers, batch.valid, *mean_outputs(outputs[name])))
            found.append((name, HostCopy(gathered)))
        while len(found) > len(hidden):  # of the batch before, while the device computes this one
            keep(*found.popleft())
        note_progress()
        after_batch()
    while found:
        keep(*found.popleft())
    return {name: Evaluation(rows, *arrays[name]) for name in hidden}


def _encoded(network: Network, batch: Batch, accelerator: Accelerator) -> Batch:
    """Return the batch with the tokens of its photos."""
    with accelerator.autocast():
        tokens: dict[str, Any] = network.encode(batch.clinical, batch.dermoscopic)
    return replace(batch, **tokens)
