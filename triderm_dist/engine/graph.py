"""The training step as one CUDA graph (`train.graph`): captured once, then replayed by one launch per step.

A step launches about 1,200 kernels; at 5 to 40 us of host time each, a fast GPU waits for its host. A graph needs one
launch, but always reads and writes the same memory. Therefore everything that differs between steps is copied into
fixed buffers on the device first: the batch, the keys of its dropout masks, its number of valid lesions, the step
number, the learning rates, and the previous step's loss sums if the loss uses them. Augmentation and mixing of lesions
run before the graph, and the average of weights is updated after it.

The first steps are trained eagerly: they compile, create optimizer states and let DDP arrange its buckets. A batch of
other shapes (number of micro-batches, tensor shapes, or the presence of `targets`, which the last epochs lack if
lesions are mixed) is captured again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from accelerate import Accelerator

from triderm_dist import optim
from triderm_dist.config import TrainConfig
from triderm_dist.data.loader import Step
from triderm_dist.distributed.parallel import Prepared, strategy_of, unwrap
from triderm_dist.engine.capture import (
    WARM_UP_PER_SHAPE,
    BatchBuffers,
    Captured,
    CaptureError,
    GraphedForward,
    on_capture_stream,
    second_stream,
    shape_key,
)
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.engine.step import StepInputs, StepResult, TrainStep
from triderm_dist.losses import CompoundLoss, Sums
from triderm_dist.models import NETWORKS
from triderm_dist.models.network import Network
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import ConfigError

WARM_UP = 3
"""Eager steps before the capture."""
DDP_WARM_UP = 11
"""Eager steps before the capture under DDP, which rebuilds its buckets after the first step and reads timers in the
first ten.
"""
Computed = tuple[Sums, torch.Tensor]
"""What `TrainStep.compute` returns."""


def choose_graph(accelerator: Accelerator, config: TrainConfig, kind: str) -> tuple[bool, str]:
    """Return (whether to capture the step, reason) for `train.graph`. kind: of the network, `models.NAME.kind`.

    Raises ConfigError if the setting is true and a step cannot be captured.
    """
    if config.graph is False:
        return False, "as set"
    refusal = _refusal(accelerator, config)
    if config.graph is True:
        if refusal:
            raise ConfigError(f"train.graph: {refusal}; set it to auto or false")
        return True, "as set"
    if refusal:
        return False, refusal
    if config.loss.terms or not isinstance(NETWORKS[kind], str):
        return False, "code of a plugin may wait for the device; train.graph=true tries it"
    return True, "auto"


def _refusal(accelerator: Accelerator, config: TrainConfig) -> str:
    """Return why a step cannot be captured; "" if it can."""
    strategy = strategy_of(accelerator)
    if accelerator.device.type != "cuda":
        return "no GPU"
    if strategy in ("fsdp2", "deepspeed"):
        return f"{strategy} gathers weights in new memory in each step"
    if accelerator.scaler is not None:
        return "the loss scaler of fp16 waits for the device"
    if config.deterministic:
        return "train.deterministic: the first steps after a start are taken without the graph, and differ by rounding"
    if not optim.is_capturable(config.optim):
        return f"the optimizer {config.optim.name} cannot be captured: it is not fused and capturable"
    return ""


def on_graph_stream(device: torch.device, graphed: bool = True) -> AbstractContextManager[None]:
    """Return the context in which a `graphed` training calls `parallel.wrap` and takes eager steps; else an empty one.

    DDP's nodes that accumulate gradients are bound to the stream on which DDP was created, and a capture must not wait
    for the default stream.
    """
    return on_capture_stream(device) if graphed else nullcontext()


def warm_up_steps(accelerator: Accelerator) -> int:
    """Return the number of eager steps before the capture."""
    return DDP_WARM_UP if strategy_of(accelerator) == "ddp" else WARM_UP


def build_step(
    accelerator: Accelerator,
    prepared: Prepared,
    loss: CompoundLoss,
    config: TrainConfig,
    guard: NonFiniteGuard,
    graphed: bool,
) -> TrainStep | GraphedStep:
    """Build the training step. prepared: as `parallel.wrap` returned it in `on_graph_stream`."""
    step = TrainStep(accelerator, prepared.network, prepared.optimizer, loss, config, guard)
    return GraphedStep(step, prepared.torch_optimizer, required=config.graph is True) if graphed else step


class GraphedStep:
    """Takes the optimizer steps of a `TrainStep` by replaying its captured computation; results are equal up to
    rounding.

    The tensors of a result are valid until the next step.  captured: the graph; None before the capture.
    forward: runs the network in evaluation, with a graph that shares the memory.
    """

    def __init__(self, eager: TrainStep, optimizer: torch.optim.Optimizer, required: bool = True) -> None:
        """optimizer: the torch one, not Accelerate's wrapper.  required: raise CaptureError if the step cannot be
        captured; otherwise steps remain eager.
        """
        self.eager, self.optimizer, self.required = eager, optimizer, required
        self._failed = False
        self.warm_up = warm_up_steps(eager.accelerator)
        self.captured: Captured[Computed] | None = None
        self.forward = GraphedForward(lambda: self.captured)
        self._eager_steps = self._with_shapes = 0
        self._shapes: object = None
        self._buffers: _Buffers | None = None

    def __call__(self, step: Step, number: int, previous: Sums | None = None) -> StepResult:
        """Take a step, see `TrainStep.__call__`."""
        inputs = self.eager.inputs(step, number, previous)
        shapes = _shape_key(inputs)
        if shapes != self._shapes:
            self._shapes, self._with_shapes, self._buffers, self.captured = shapes, 0, None, None
            self.forward.reset()
        if self._failed or self._eager_steps < self.warm_up or self._with_shapes < WARM_UP_PER_SHAPE:
            self._eager_steps += 1
            self._with_shapes += 1
            sums, norm = self._warm(inputs)
        else:
            sums, norm = self._replayed(inputs)
        return StepResult(sums, step.count, norm)

    def _replayed(self, inputs: StepInputs) -> Computed:
        if self._buffers is None:
            self._buffers = _Buffers(inputs, len(self.optimizer.param_groups), self.eager.accelerator.device)
        self._buffers.fill(inputs, [float(group["lr"]) for group in self.optimizer.param_groups])
        if self.captured is None:
            own = self._buffers.inputs
            try:
                with _rates_on_device(self.optimizer, self._buffers.rates):
                    self.captured = self._capture(lambda: self.eager.compute(own))
            except CaptureError as error:
                if self.required:
                    raise
                self.eager.accelerator.print(wrapped(f"{error}. Steps are launched without"), flush=True)
                self._failed, self._buffers = True, None
        if self.captured is None:
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()  # frees the activations in the traceback
            return self._warm(inputs)
        return self.captured()

    def _warm(self, inputs: StepInputs) -> Computed:
        with on_capture_stream(self.eager.accelerator.device):
            return self.eager.compute(inputs)

    def _capture(self, compute: Callable[[], Computed]) -> Captured[Computed]:
        # DDP accumulates the gradients of both towers on one stream, which would wait for the other in each block.
        device, single = self.eager.accelerator.device, strategy_of(self.eager.accelerator) == "single"
        network = cast("Network", unwrap(self.eager.wrapped))
        with network.towers_on_two_streams(second_stream(device) if single else None):
            return Captured(compute, device)


class _Buffers:
    """Tensors on the device that a graph reads, and the `StepInputs` that consist of them."""

    def __init__(self, inputs: StepInputs, groups: int, device: torch.device) -> None:
        """groups: number of the optimizer's parameter groups."""
        sizes = [0 if keys is None else len(keys) for keys in inputs.keys]
        self._integers = torch.zeros(1 + sum(sizes), dtype=torch.int64, device=device)
        self._floats = torch.zeros(1 + groups, device=device)
        self._batches = BatchBuffers(inputs.micro_batches)
        number, *keys = self._integers.split([1, *sizes])
        self.rates = self._floats[1:]
        self.inputs = StepInputs(
            self._batches.batches,
            [own if size else None for own, size in zip(keys, sizes, strict=True)],
            self._floats[0],
            number[0],
            inputs.previous and {name: torch.empty_like(sums) for name, sums in inputs.previous.items()},
        )

    @torch.no_grad()
    def fill(self, inputs: StepInputs, rates: list[float]) -> None:
        """Copy the inputs of a step into the buffers, which have the same shapes."""
        drawn = [keys for keys in inputs.keys if keys is not None]
        integers = torch.cat([torch.tensor([inputs.number]), *drawn])
        self._integers.copy_(integers, non_blocking=True)
        self._floats.copy_(torch.tensor([float(inputs.count), *rates]), non_blocking=True)
        self._batches.fill(inputs.micro_batches)
        for name, sums in (inputs.previous or {}).items():
            assert self.inputs.previous is not None
            self.inputs.previous[name].copy_(sums)


def _shape_key(inputs: StepInputs) -> object:
    """Return the shapes of a step's inputs; equal for steps that can use the same graph."""
    batches = [shape_key(batch) for batch in inputs.micro_batches]
    return batches, [keys is not None for keys in inputs.keys], sorted(inputs.previous or {})


@contextmanager
def _rates_on_device(optimizer: torch.optim.Optimizer, rates: torch.Tensor) -> Iterator[None]:
    """Make the optimizer's step capturable in the block, with its learning rates read from `rates` (groups,).

    Outside of the block the rates are floats, as schedulers and checkpoints expect.
    """
    before = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["capturable"] = rate, True
    try:
        yield
    finally:
        for group, (rate, capturable) in zip(optimizer.param_groups, before, strict=True):
            group["lr"], group["capturable"] = rate, capturable
