"""Compute network outputs for given lesions, gathered on rank 0 and equal to the outputs of one process.

Outputs are gathered batch by batch, so that memory does not grow with the number of lesions.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
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
from triderm_dist.distributed.collectives import gather_on_main
from triderm_dist.distributed.heartbeat import note_progress
from triderm_dist.models.network import Network
from triderm_dist.schema import VIEWS, Batch, Outputs

OUTPUTS = ("logits", "aux_clinical", "aux_dermoscopic", "features")
INPUTS = (*VIEWS, "concepts", "metadata")
"""Inputs of a network, by their names in `models.NAME.use`."""


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


def network_inputs(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Return the arguments of a network's `forward`."""
    return batch.clinical, batch.dermoscopic, batch.view_present, batch.concepts, batch.metadata


def forward(network: nn.Module, batch: Batch) -> Outputs:
    """Run the network on a batch."""
    return network(*network_inputs(batch))


def hide_input(batch: Batch, name: str, concepts: Sequence[str]) -> Batch:
    """Return the batch with one input of `INPUTS` treated as missing.

    Hiding a view hides its photo and the concept scores that were derived from it.  concepts: names of the K scores.
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


def mean_outputs(outputs: Sequence[Outputs], names: Sequence[str] = OUTPUTS) -> list[torch.Tensor]:
    """Average a network's outputs for a batch over the transforms, in float32: logits, aux_clinical, aux_dermoscopic
    (B, C), NaN for the auxiliary logits of a view that the task lacks, and features (B, D). names: of those to return.
    """
    absent = torch.full_like(outputs[0].logits, torch.nan)
    columns = ([getattr(output, name) for output in outputs] for name in names)
    return [absent if parts[0] is None else torch.stack([part.float() for part in parts]).mean(0) for parts in columns]


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
    names: Sequence[str] = OUTPUTS,
) -> Evaluation:
    """Return the outputs of `evaluate_parts` for all rows, with all inputs; ranks other than 0 one of no rows."""
    parts = evaluate_parts(
        network, loaders, rows, accelerator,
        micro_batch=micro_batch, transforms=transforms, after_batch=after_batch, run=run, names=names,
    )  # fmt: skip
    nothing = Evaluation(np.empty(0, np.int64), *[np.empty((0, 0), np.float32)] * len(OUTPUTS))
    columns = zip(*(vars(part).values() for part in [part for _, part in parts] or [nothing]), strict=True)
    return Evaluation(*(np.concatenate(column) for column in columns))


@torch.no_grad()
def evaluate_parts(
    network: nn.Module,
    loaders: LoaderFactory,
    rows: np.ndarray,
    accelerator: Accelerator,
    *,
    micro_batch: int,
    hidden: Sequence[str | None] = (None,),
    transforms: int = 1,
    after_batch: Callable[[], None] = lambda: None,
    run: Callable[[nn.Module, Batch], Outputs] = forward,
    names: Sequence[str] = OUTPUTS,
) -> Iterator[tuple[str | None, Evaluation]]:
    """Yield, on rank 0, each of `hidden` with the outputs for the next of the index `rows` (N,), in their order.

    Outputs are means over the first `transforms` transforms of the dihedral group. Photos are decoded once, and encoded
    by the towers of a `Network` once, for all of `hidden`; one forward pass per transform gives features and all
    logits. All batches have one shape: the last one is padded. Iterate on all ranks.

    hidden: inputs that are treated as missing in turn (see `hide_input`); None hides none.
    after_batch: called on all ranks after every batch, and may raise.  run: runs the network.
    names: of the outputs to keep; the others are (N, 0).
    """
    network.eval()
    index, device = loaders.index, accelerator.device
    loader = loaders.sequential(
        rows, micro_batch, device, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    pending = _Pending(rows, names)
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
        for name in hidden:
            pending.add(name, step.count, mean_outputs(outputs[name], names))
        yield from pending.arrived(newest=len(hidden))  # copy the previous batch while the device computes this one
        note_progress()
        after_batch()
    yield from pending.arrived()


class _Pending:
    """Outputs of `evaluate_parts` that are being copied from the device."""

    def __init__(self, rows: np.ndarray, names: Sequence[str]) -> None:
        self._rows, self._names = rows, names
        self._copies: deque[tuple[str | None, list[int], int, HostCopy]] = deque()
        self._arrived: Counter[str | None] = Counter()

    def add(self, name: str | None, count: int, outputs: Sequence[torch.Tensor]) -> None:
        """Gather the outputs (B, ...) of all ranks and begin to copy them. Call on all ranks.

        count: rows of the batch, without padding.
        """
        # Ranks hold consecutive parts of the batch, so that gathering keeps its order, with padding last.
        gathered = gather_on_main(torch.cat([*outputs], dim=1))
        if gathered is not None:
            self._copies.append((name, [output.shape[1] for output in outputs], count, HostCopy([gathered])))

    def arrived(self, newest: int = 0) -> Iterator[tuple[str | None, Evaluation]]:
        """Wait for all copies but the `newest` ones, and yield them."""
        while len(self._copies) > newest:
            name, widths, count, copy = self._copies.popleft()
            values = np.split(copy.arrays()[0][:count], np.cumsum(widths)[:-1], axis=1)
            found = dict(zip(self._names, values, strict=True))
            start = self._arrived[name]
            self._arrived[name] += count
            rows = self._rows[start : start + count]
            yield name, Evaluation(rows, *(found.get(each, np.empty((count, 0), np.float32)) for each in OUTPUTS))


def _encoded(network: Network, batch: Batch, accelerator: Accelerator) -> Batch:
    """Return the batch with the tokens of its photos."""
    with accelerator.autocast():
        tokens: dict[str, Any] = network.encode(batch.clinical, batch.dermoscopic)
    return replace(batch, **tokens)
