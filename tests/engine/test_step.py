"""A training step reads no number from the device, and takes no more operations than before.

It runs on fake tensors, which have shapes but no data: what needs a number raises, as it would make the host wait for a
GPU. Operations are those of PyTorch below autograd, of which most launch a kernel.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from triderm_dist.config import Experiment, ModelConfig, load
from triderm_dist.data.loader import Step
from triderm_dist.distributed import parallel
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.engine.step import TrainStep
from triderm_dist.losses import LOSS_TERMS, CompoundLoss, LossInputs, LossTerm
from triderm_dist.models.dropout import _tables
from triderm_dist.models.network import Network
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.monitoring.memory_estimate import network_without_weights
from triderm_dist.optim import build_optimizer
from triderm_dist.schema import Batch, ConfigError, InputError
from triderm_dist.tasks import milk10k_task

LESIONS = 4
SIGNATURE = milk10k_task().signature(("clinical/a", "dermoscopic/a"))
OPERATIONS = {"trimodal": 1361, "dual_cnn": 862}
"""Of a step with one micro-batch, bf16, on a CPU. Lower them where a change takes fewer; raise them only for a
reason.
"""
NO_KERNEL = (
    "view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "split", "unbind",
    "detach", "alias", "as_strided", "unsafe_view", "empty", "empty_like", "empty_strided", "device",
)  # fmt: skip
"""Operations that only make a tensor or another view of one."""


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[function.overloadpacket.__name__.lstrip("_")] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(number for name, number in self.found.items() if name not in NO_KERNEL)


@pytest.fixture(autouse=True)
def no_fake_tables() -> Iterator[None]:
    """Drop the cached tables of dropout after each test: fake ones would enter the trainings of other tests."""
    yield
    _tables.cache_clear()


def settings(kind: str, *words: str) -> ModelConfig:
    tower = {"trimodal": "test_vit", "dual_cnn": "test_efficientnet"}[kind]
    model = f"models.m={{kind: {kind}, width: 32, heads: 2}}"
    shape = f"models.m.tower={{source: 'timm:{tower}', image_size: 32, freeze_clinical: 3, freeze_dermoscopic: 3}}"
    return load(Experiment, None, [model, shape, *words]).models["m"]


def new_step(
    model: ModelConfig, network: Network, accelerator: Accelerator, term: type[LossTerm] | None = None
) -> TrainStep:
    """Return the step of a network's training. term: instead of focal loss."""
    config, classes = model.train, np.ones(len(network.signature.diagnoses))
    build = partial(build_optimizer, config=config.optim)
    wrapped, prepared, optimizer = parallel.wrap(accelerator, network, build, config)
    loss = CompoundLoss(config.loss, model.head, classes)
    if term:
        loss.terms["focal"] = term(config.loss, torch.from_numpy(classes))
    return TrainStep(accelerator, wrapped.train(), prepared, loss, config, NonFiniteGuard(accelerator, optimizer))


def batch_of(network: Network) -> Step:
    random = np.random.default_rng(0)
    batch = Batch(
        ["lesion"] * LESIONS, *example_inputs(network, LESIONS), torch.zeros(LESIONS, dtype=torch.long),
        torch.ones(LESIONS, dtype=torch.bool),
        draws=lambda names: random.integers(0, 2**64, (LESIONS, len(names)), np.uint64),
    )  # fmt: skip
    return Step(0, LESIONS, [batch], np.arange(LESIONS))


def take_steps(kind: str, *words: str, term: type[LossTerm] | None = None) -> CountOperations:
    """Take two steps on fake tensors; return the operations of the second one."""
    batches = [f"train.global_batch={LESIONS}", f"train.micro_batch={LESIONS}", "train.precision=bf16"]
    model = settings(kind, *batches, "models.m.dropout=0.1", "models.m.tower.drop_path=0.1", *words)
    real = network_without_weights(model, SIGNATURE)[0]
    accelerator = parallel.start_training(model.train)
    accelerator.device_placement = False  # fake parameters cannot be moved
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = [*real.parameters(), *real.buffers()]
        network = copy.deepcopy(real, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
        step = new_step(model, network, accelerator, term)
        batch = batch_of(network)
        for number in range(2):
            with CountOperations() as counted:
                step(batch, number)
    return counted


@pytest.mark.parametrize("kind", OPERATIONS)
def test_operations_of_a_step(kind: str) -> None:
    counted = take_steps(kind)
    # Another version of PyTorch may split an operation in other parts.
    assert counted.total == pytest.approx(OPERATIONS[kind], rel=0.03), counted.found.most_common(30)


class Waiting(LossTerm):
    def per_lesion(self, inputs: LossInputs) -> torch.Tensor:
        return inputs.logits.sum(1) if inputs.logits.sum() > 0 else inputs.logits.mean(1)


def test_a_step_that_reads_a_number_is_found() -> None:
    with pytest.raises(DataDependentOutputException):
        take_steps("dual_cnn", term=Waiting)


def test_a_parameter_that_the_loss_is_independent_of_is_refused() -> None:
    """One process would train without it, and DDP fail in the second step."""
    model = settings("dual_cnn", f"train.global_batch={LESIONS}", f"train.micro_batch={LESIONS}")
    network = network_without_weights(model, SIGNATURE)[0]
    network.unused = torch.nn.Linear(2, 2)
    step = new_step(model, network, parallel.start_training(model.train))
    with pytest.raises(ConfigError, match=r"independent of the parameter unused.weight and of 1 more; use it in fuse"):
        step(batch_of(network), 0)


class Infinite(LossTerm):
    def per_lesion(self, inputs: LossInputs) -> torch.Tensor:
        return inputs.logits.sum(1) / 0


class InfiniteGradient(LossTerm):
    def per_lesion(self, inputs: LossInputs) -> torch.Tensor:
        return (inputs.logits.sum(1) * 0).sqrt()


@pytest.mark.parametrize(
    "term, photos, message",
    [
        (Infinite, 0.0, "step 1: train.loss.terms.own is not finite; the step was not taken. Correct the term and"),
        (InfiniteGradient, 0.0, "lower train.optim.lr, or correct train.loss.terms.own if its gradient is infinite"),
        (Infinite, torch.nan, "step 1: loss or gradient is not finite; .* lower train.optim.lr to resume"),
    ],
)
def test_a_term_of_a_plugin_that_is_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch, term: type[LossTerm], photos: float, message: str
) -> None:
    monkeypatch.setitem(LOSS_TERMS, "own", term)
    batches = [f"train.global_batch={LESIONS}", f"train.micro_batch={LESIONS}", "train.precision=fp32"]
    model = settings("dual_cnn", *batches, "train.loss.terms={own: {weight: 1}}")
    network = network_without_weights(model, SIGNATURE)[0]
    step = new_step(model, network, parallel.start_training(model.train))
    batch = batch_of(network)
    batch.micro_batches[0].clinical.fill_(photos)
    batch.micro_batches[0].dermoscopic.fill_(photos)
    step(batch, 0)
    step(batch_of(network), 1)  # not taken either
    with pytest.raises(InputError, match=message):
        step.guard.check()


@pytest.mark.parametrize("counts", [(4, 12), (12, 4)])
def test_sums_of_the_step_before_are_scaled_to_the_batch(counts: tuple[int, int]) -> None:
    """The same four lesions make both batches, once or three times, so that their sums are in proportion."""
    words = ["train.global_batch=12", "train.micro_batch=6", "train.precision=fp32", "models.m.dropout=0"]
    norms = {}
    for option in ("exact", "previous"):
        model = settings("trimodal", *words, "train.optim.lr=1e-30", f"train.loss.soft_f1_sums={option}")
        torch.manual_seed(0)
        network = network_without_weights(model, SIGNATURE)[0]
        step, sums = new_step(model, network, parallel.start_training(model.train)), None
        for number, count in enumerate(counts):
            rows = torch.arange(12) % 4
            photos = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))[rows]
            inputs = photos, photos, *(each[rows] for each in example_inputs(network, 4)[2:])
            whole = Batch([""] * 12, *inputs, labels=rows, valid=torch.arange(12) < count)
            tensors = {name: value for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
            halves = [replace(whole, **{name: value[at : at + 6] for name, value in tensors.items()}) for at in (0, 6)]
            result = step(Step(0, count, halves, np.arange(12)), number, sums)
            sums = result.sums_of(12)
        norms[option] = result.grad_norm.item()
    assert norms["previous"] == pytest.approx(norms["exact"], rel=1e-4)
