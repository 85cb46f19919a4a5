"""Compute network outputs for given lesions, gathered on rank 0 and equal to the outputs of one process.

Outputs are gathered batch by batch, so that memory does not grow with the number of lesions.
"""

from __future__ import annotations

from collections import Counter, deque
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
    """Average the outputs for index `rows` (N,) over the first `transforms` transforms of the dihedral group.

    Photos are decoded once; one forward pass per transform gives features and all logits. All batches have one shape:
    the last one is padded. Call on all ranks; ranks other than 0 return an evaluation of no rows.
    after_batch: called on all ranks after every batch, and may raise.  run: runs the network.
    names: of the outputs to keep; the others are (N, 0).
    """
    parts = [Evaluation(np.empty(0, np.int64), *[np.empty((0, 0), np.float32)] * len(OUTPUTS))]
    evaluate_hidden(
        network, loaders, rows, accelerator, (None,), lambda name, part: parts.append(part),
        micro_batch=micro_batch, transforms=transforms, after_batch=after_batch, run=run, names=names,
    )  # fmt: skip
    columns = zip(*(vars(part).values() for part in parts[1:] or parts), strict=True)
    return Evaluation(*(np.concatenate(column) for column in columns))


@torch.no_grad()
def evaluate_hidden(
    network: nn.Module,
    loaders: LoaderFactory,
    rows: np.ndarray,
    accelerator: Accelerator,
    hidden: Sequence[str | None],
    keep: Callable[[str | None, Evaluation], None],
    *,
    micro_batch: int,
    transforms: int = 1,
    after_batch: Callable[[], None] = lambda: None,
    run: Callable[[nn.Module, Batch], Outputs] = forward,
    names: Sequence[str] = OUTPUTS,
) -> None:
    """Evaluate as `evaluate`, once with each input of `hidden` treated as missing (see `hide_input`); None hides none.

    Photos are decoded once, and encoded by the towers of a `Network` once, for all of `hidden`.
    keep: called on rank 0 with each of `hidden` and the outputs for the next rows, in the order of `rows`.
    """
    network.eval()
    index, device = loaders.index, accelerator.device
    loader = loaders.sequential(
        rows, micro_batch, device, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    pending = _Pending(rows, names, keep)
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
        pending.deliver(newest=len(hidden))  # copy the previous batch while the device computes this one
        note_progress()
        after_batch()
    pending.deliver()


class _Pending:
    """Outputs that are being copied from the device, until they are delivered to `keep` (see `evaluate_hidden`)."""

    def __init__(self, rows: np.ndarray, names: Sequence[str], keep: Callable[[str | None, Evaluation], None]) -> None:
        self._rows, self._names, self._keep = rows, names, keep
        self._copies: deque[tuple[str | None, list[int], int, HostCopy]] = deque()
        self._delivered: Counter[str | None] = Counter()

    def add(self, name: str | None, count: int, outputs: Sequence[torch.Tensor]) -> None:
        """Gather the outputs (B, ...) of all ranks and begin to copy them. Call on all ranks.

        count: rows of the batch, without padding.
        """
        # Ranks hold consecutive parts of the batch, so that gathering keeps its order, with padding last.
        gathered = gather_on_main(torch.cat([*outputs], dim=1))
        if gathered is not None:
            self._copies.append((name, [output.shape[1] for output in outputs], count, HostCopy([gathered])))

    def deliver(self, newest: int = 0) -> None:
        """Deliver all copies but the `newest` ones."""
        while len(self._copies) > newest:
            name, widths, count, copy = self._copies.popleft()
            values = np.split(copy.arrays()[0][:count], np.cumsum(widths)[:-1], axis=1)
            found = dict(zip(self._names, values, strict=True))
            start = self._delivered[name]
            self._delivered[name] += count
            rows = self._rows[start : start + count]
            columns = (found.get(each, np.empty((count, 0), np.float32)) for each in OUTPUTS)
            self._keep(name, Evaluation(rows, *columns))


def _encoded(network: Network, batch: Batch, accelerator: Accelerator) -> Batch:
    """Return the batch with the tokens of its photos."""
    with accelerator.autocast():
        tokens: dict[str, Any] = network.encode(batch.clinical, batch.dermoscopic)
    return replace(batch, **tokens)
