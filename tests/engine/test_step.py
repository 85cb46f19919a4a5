"""A training step reads no number from the device, and takes no more operations than before.

It runs on fake tensors, which have shapes but no data: what needs a number raises, as it would make the host wait for a
GPU. Operations are those of PyTorch below autograd, of which most launch a kernel.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from triderm_dist.config import Experiment, load
from triderm_dist.data.loader import Step
from triderm_dist.distributed import parallel
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.engine.step import TrainStep
from triderm_dist.losses import CompoundLoss, LossInputs, LossTerm
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.monitoring.memory_estimate import network_without_weights
from triderm_dist.optim import build_optimizer
from triderm_dist.schema import Batch
from triderm_dist.tasks import milk10k_task

LESIONS = 4
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


def take_steps(kind: str, *settings: str, term: type[LossTerm] | None = None) -> CountOperations:
    """Take two steps on fake tensors; return the operations of the second one."""
    tower = {"trimodal": "test_vit", "dual_cnn": "test_efficientnet"}[kind]
    batches = [f"train.global_batch={LESIONS}", f"train.micro_batch={LESIONS}", "train.precision=bf16"]
    model = load(
        Experiment, None,
        [
            f"models.m={{kind: {kind}, width: 32, heads: 2, dropout: 0.1}}", *batches,
            f"models.m.tower={{source: 'timm:{tower}', image_size: 32, freeze_clinical: 3, drop_path: 0.1}}",
            "models.m.tower.freeze_dermoscopic=3",
            *settings,
        ],
    ).models["m"]  # fmt: skip
    signature = milk10k_task().signature(("clinical/a", "dermoscopic/a"))
    real, config = network_without_weights(model, signature)[0], model.train
    accelerator = parallel.start_training(config)
    accelerator.device_placement = False  # fake parameters cannot be moved
    random = np.random.default_rng(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = [*real.parameters(), *real.buffers()]
        network = copy.deepcopy(real, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
        build = partial(build_optimizer, config=config.optim)
        wrapped, prepared, optimizer = parallel.wrap(accelerator, network, build, False, False)
        loss = CompoundLoss(config.loss, model.head, np.ones(len(signature.diagnoses)))
        if term:
            loss.terms["focal"] = term(config.loss, torch.ones(len(signature.diagnoses)))
        step = TrainStep(accelerator, wrapped.train(), prepared, loss, config, NonFiniteGuard(accelerator, optimizer))
        batch = Batch(
            ["lesion"] * LESIONS, *example_inputs(network, LESIONS), torch.zeros(LESIONS, dtype=torch.long),
            torch.ones(LESIONS, dtype=torch.bool),
            draws=lambda names: random.integers(0, 2**64, (LESIONS, len(names)), np.uint64),
        )  # fmt: skip
        for number in range(2):
            with CountOperations() as counted:
                step(Step(0, LESIONS, [batch], np.arange(LESIONS)), number)
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
