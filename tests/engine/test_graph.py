"""The step of fixed buffers that a CUDA graph captures, run here without capturing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests.small_tasks import task_of
from triderm_dist.config import ModelConfig, TrainConfig
from triderm_dist.data.augment import LesionRng, lesion_keys
from triderm_dist.data.loader import Step
from triderm_dist.distributed import parallel
from triderm_dist.engine.capture import CaptureError, GraphedForward
from triderm_dist.engine.evaluate import forward
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.engine.graph import WARM_UP, GraphedStep, choose_graph
from triderm_dist.engine.step import TrainStep
from triderm_dist.losses import CompoundLoss
from triderm_dist.models import build_network
from triderm_dist.models.towers import TokenShape
from triderm_dist.optim import build_optimizer, build_scheduler
from triderm_dist.schema import Batch, ConfigError, InputError
from triderm_dist.settings import validate

CPU = torch.device("cpu")
SIGNATURE = task_of().signature(("clinical/veil", "dermoscopic/veil"))
LESIONS = 4


class Uncaptured(GraphedStep):
    """Runs the step on its buffers instead of capturing it."""

    def _warm(self, inputs):
        return self.eager.compute(inputs)

    def _capture(self, compute):
        self.captures = getattr(self, "captures", 0) + 1
        return compute


class Run:
    """A small training on random tokens. Its rates change from step to step, and it drops by lesion."""

    def __init__(self, kind: Callable[..., GraphedStep] | None, micro_batches: int = 1, **settings) -> None:
        torch.manual_seed(0)
        batch = {"global_batch": LESIONS * micro_batches, "micro_batch": LESIONS}
        config = validate(TrainConfig, {"precision": "fp32", "epochs": 2, **batch, **settings})
        model = validate(ModelConfig, {"width": 16, "heads": 2, "depth": 1, "dropout": 0.3, "tower": {"frozen": True}})
        accelerator = parallel.start_training(config)
        network = build_network(model, SIGNATURE, TokenShape(3, 8))
        build = partial(build_optimizer, config=config.optim)
        self.wrapped, prepared, optimizer = parallel.wrap(accelerator, network, build, config)
        self.scheduler = build_scheduler(optimizer, config.optim, 12, 6)
        self.guard = NonFiniteGuard(accelerator, optimizer)
        loss = CompoundLoss(config.loss, model.head, [3, 2, 1])
        eager = TrainStep(accelerator, self.wrapped, prepared, loss, config, self.guard)
        self.step = kind(eager, optimizer) if kind else eager
        self.optimizer, self.micro_batches, self.sums, self.number = optimizer, micro_batches, None, 0
        self.wrapped.train()

    def train(self, steps: int, mixed: bool = False) -> list[list[float]]:
        """Take steps; return the numbers of each: sums and norm."""
        found = []
        for _ in range(steps):
            result = self.step(step_of(self.number, self.micro_batches, mixed), self.number, self.sums)
            self.sums, self.number = result.sums, self.number + 1
            self.scheduler.step()
            found.append(
                [*torch.cat([each.flatten() for each in result.sums.values()]).tolist(), float(result.grad_norm)]
            )
        return found


def step_of(number: int, micro_batches: int, mixed: bool) -> Step:
    """Return the step of this number; its last micro-batch is padded by as many lesions as the number tells."""
    random = torch.Generator().manual_seed(number)
    batches = []
    for at in range(micro_batches):
        ids = [f"{number}-{at}-{lesion}" for lesion in range(LESIONS)]
        photos = [torch.randn(LESIONS, 3, 8, generator=random) for _ in range(2)]
        present = torch.rand(LESIONS, 2, generator=random) < 0.8
        valid = torch.arange(LESIONS) < LESIONS - (number % 3 if at + 1 == micro_batches else 0)
        numbers = [torch.rand(LESIONS, n, generator=random) for n in (2, 2)]
        labels = torch.randint(0, 3, (LESIONS,), generator=random)
        draws = LesionRng(0, 0, lesion_keys(ids), np.zeros(LESIONS, np.int64)).bits
        batch = Batch(ids, *photos, present, *numbers, labels, valid, draws=draws)
        if mixed:
            batch = replace(batch, targets=torch.rand(LESIONS, 3, generator=random).softmax(1))
        batches.append(batch)
    count = sum(int(batch.valid.sum()) for batch in batches)
    return Step(number, count, batches, np.arange(LESIONS * micro_batches))


@pytest.mark.parametrize(
    ("micro_batches", "settings"),
    [(1, {}), (2, {}), (2, {"loss": {"soft_f1_sums": "previous"}})],
)
def test_step_on_buffers_equals_the_eager_step(micro_batches: int, settings: dict) -> None:
    eager, graphed = Run(None, micro_batches, **settings), Run(Uncaptured, micro_batches, **settings)
    expected, found = eager.train(5), graphed.train(5)
    assert graphed.step.captures == 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(eager.wrapped.parameters(), graphed.wrapped.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert {type(group["lr"]) for group in graphed.optimizer.param_groups} == {float}


def test_batches_of_another_form_are_captured_anew() -> None:
    eager, graphed = Run(None), Run(Uncaptured)
    expected = eager.train(5, mixed=True) + eager.train(4)
    found = graphed.train(5, mixed=True) + graphed.train(4)
    assert graphed.step.captures == 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_steps_that_cannot_be_captured_stay_eager_or_end_the_training(capfd) -> None:
    class Uncapturable(Uncaptured):
        def _capture(self, compute):
            raise CaptureError("train.graph: no CUDA graph can be made (it waits)")

    required, eager, found = Run(Uncapturable), Run(None), Run(partial(Uncapturable, required=False))
    np.testing.assert_array_equal(found.train(6), eager.train(6))
    assert capfd.readouterr().out.count("it waits") == 1
    required.train(WARM_UP)
    with pytest.raises(InputError, match="it waits"):
        required.train(1)


def test_evaluation_on_buffers_equals_the_eager_one() -> None:
    class UncapturedForward(GraphedForward):
        captures = 0

        def _capture(self, compute, device):
            self.captures += 1
            return compute

    run, buffered = Run(None), UncapturedForward()
    run.wrapped.eval()
    batches = [step_of(number, 1, False).micro_batches[0] for number in range(5)]
    with torch.no_grad():
        expected, found = ([each(run.wrapped, batch) for batch in batches] for each in (forward, buffered))
    assert buffered.captures == 1
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(tuple(a), tuple(b))


def test_non_finite_step_names_its_number_and_lesions() -> None:
    run = Run(Uncaptured)
    run.train(WARM_UP + 2)
    weights = [p.clone() for p in run.wrapped.parameters()]
    bad = step_of(run.number, 1, False)
    bad.micro_batches[0].clinical.fill_(torch.nan)
    bad.micro_batches[0].view_present.fill_(True)
    run.step(bad, run.number, run.sums)
    run.number += 1
    run.train(2)
    with pytest.raises(InputError, match=rf"step {WARM_UP + 3}: .*: {WARM_UP + 2}-0-0, "):
        run.guard.check()
    assert all(torch.equal(a, b) for a, b in zip(weights, run.wrapped.parameters(), strict=True))


def test_graph_is_refused_by_name_and_off_by_itself_without_a_gpu() -> None:
    config = validate(TrainConfig, {"precision": "fp32"})
    accelerator = parallel.start_training(config)
    assert choose_graph(accelerator, config, "trimodal") == (False, "no GPU")
    with pytest.raises(ConfigError, match=r"train\.graph: no GPU; set it to auto or false"):
        choose_graph(accelerator, config.model_copy(update={"graph": True}), "trimodal")
