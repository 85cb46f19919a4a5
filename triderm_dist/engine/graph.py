"""The training step as one CUDA graph (`train.graph`): captured once, then launched by a single call per step.

A step launches some 1,400 kernels; at 5 to 40 us of host time each a fast GPU waits for its host. A graph is launched
at once, but always reads and writes the same memory. So everything that differs between steps is copied to fixed
buffers on the device first: the batch, the keys of its dropout masks, the number of its valid lesions, the number of
the step, the learning rates, and the loss sums of the step before where the loss uses them. Augmentation and mixing of
lesions are done before, and the average of weights is moved after a step.

The first steps are eager, and real ones: they compile, create optimizer states and let DDP arrange its buckets. A batch
of another form (micro-batches, shapes, or the presence of `targets`, which the last epochs lack where lesions are
mixed) is captured anew.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist import optim
from triderm_dist.config import TrainConfig
from triderm_dist.data.loader import Step
from triderm_dist.distributed.parallel import strategy_of
from triderm_dist.engine.capture import (
    WARM_UP_OF_FORM,
    BatchBuffers,
    Captured,
    CaptureError,
    GraphedForward,
    form_of,
    on_capture_stream,
)
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.engine.step import StepInputs, StepResult, TrainStep
from triderm_dist.losses import CompoundLoss, Sums
from triderm_dist.models import NETWORKS
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import ConfigError

WARM_UP = 3
"""Eager steps of a training before its step is captured."""
DDP_WARM_UP = 11
"""The same under DDP: it arranges its buckets after the first step, and reads its timers in the first ten."""
Computed = tuple[Sums, torch.Tensor]
"""What `TrainStep.compute` returns."""


def choose_graph(accelerator: Accelerator, config: TrainConfig, kind: str) -> tuple[bool, str]:
    """Return (whether to capture the step, reason) for `train.graph`. kind: of the network, `models.NAME.kind`.

    Raises ConfigError where it is true and cannot work.
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
    """Return the context for `parallel.wrap`, and for eager steps, of a training that is `graphed`; else an empty one.

    The nodes that accumulate gradients under DDP belong to the stream on which DDP was created, and during a capture
    nothing may wait for the default stream.
    """
    return on_capture_stream(device) if graphed else nullcontext()


def warm_up_steps(accelerator: Accelerator) -> int:
    """Return how many eager steps a training takes before its step is captured."""
    return DDP_WARM_UP if strategy_of(accelerator) == "ddp" else WARM_UP


def build_step(
    accelerator: Accelerator,
    network: nn.Module,
    prepared: torch.optim.Optimizer,
    optimizer: torch.optim.Optimizer,
    loss: CompoundLoss,
    config: TrainConfig,
    guard: NonFiniteGuard,
    graphed: bool,
) -> TrainStep | GraphedStep:
    """Return what takes the steps of a training. network, prepared, optimizer: as `parallel.wrap` returned them, on the
    stream of `on_graph_stream` where `graphed`.
    """
    step = TrainStep(accelerator, network, prepared, loss, config, guard)
    return GraphedStep(step, optimizer, required=config.graph is True) if graphed else step


class GraphedStep:
    """Takes the optimizer steps of a `TrainStep` by replaying its captured computation; the same up to rounding.

    The tensors of a result are valid until the next step.  captured: the graph, once there is one.  forward: runs the
    network in evaluation, by a graph in the same memory.
    """

    def __init__(self, eager: TrainStep, optimizer: torch.optim.Optimizer, required: bool = True) -> None:
        """optimizer: the plain one, not Accelerate's wrapper.  required: raise CaptureError where the step cannot be
        captured; otherwise steps remain eager.
        """
        self.eager, self.optimizer, self.required = eager, optimizer, required
        self._failed = False
        self.warm_up = warm_up_steps(eager.accelerator)
        self.captured: Captured[Computed] | None = None
        self.forward = GraphedForward(lambda: self.captured)
        self._eager_steps = self._of_form = 0
        self._form: object = None
        self._buffers: _Buffers | None = None

    def __call__(self, step: Step, number: int, previous: Sums | None = None) -> StepResult:
        """Take a step, see `TrainStep.__call__`."""
        inputs = self.eager.inputs(step, number, previous)
        form = _form(inputs)
        if form != self._form:
            self._form, self._of_form, self._buffers, self.captured = form, 0, None, None
            self.forward.reset()
        if self._failed or self._eager_steps < self.warm_up or self._of_form < WARM_UP_OF_FORM:
            self._eager_steps += 1
            self._of_form += 1
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
        return Captured(compute, self.eager.accelerator.device)


class _Buffers:
    """Tensors on the device that a graph reads, and the `StepInputs` made of them."""

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
        """Copy the inputs of a step here. They have the form of those that the buffers were made for."""
        drawn = [keys for keys in inputs.keys if keys is not None]
        integers = torch.cat([torch.tensor([inputs.number]), *drawn])
        self._integers.copy_(integers, non_blocking=True)
        self._floats.copy_(torch.tensor([float(inputs.count), *rates]), non_blocking=True)
        self._batches.fill(inputs.micro_batches)
        for name, sums in (inputs.previous or {}).items():
            assert self.inputs.previous is not None
            self.inputs.previous[name].copy_(sums)


def _form(inputs: StepInputs) -> object:
    """Return what must be equal for two steps to use the same graph."""
    batches = [form_of(batch) for batch in inputs.micro_batches]
    return batches, [keys is not None for keys in inputs.keys], sorted(inputs.previous or {})


@contextmanager
def _rates_on_device(optimizer: torch.optim.Optimizer, rates: torch.Tensor) -> Iterator[None]:
    """Context in which the optimizer's step may be captured and reads its learning rates from `rates` (groups,).

    Outside the rates are numbers, as the schedule sets and checkpoints hold them.
    """
    before = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["capturable"] = rate, True
    try:
        yield
    finally:
        for group, (rate, capturable) in zip(optimizer.param_groups, before, strict=True):
            group["lr"], group["capturable"] = rate, capturable
