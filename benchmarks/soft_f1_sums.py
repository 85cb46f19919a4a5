"""Compare three sources of the sums over the global batch that soft F1 needs under gradient accumulation:

- exact: a first pass over the micro-batches without gradients (train.loss.soft_f1_sums=exact);
- previous: the sums of the step before (train.loss.soft_f1_sums=previous);
- per micro-batch: soft F1 of each micro-batch, averaged, as a loss unaware of accumulation computes it.

python -m benchmarks.soft_f1_sums [steps=24] [key=value ...]

Needs the demo data (make demo), or other packed shards. One network is trained with exact sums; at every step the
gradient of each method is compared with the formula on the undivided batch, and the engine's step is timed with exact
and with previous sums, alternating. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section

if TYPE_CHECKING:
    import torch

    from triderm_dist.config import Experiment, ModelConfig
    from triderm_dist.engine.model_inputs import ModelInputs
    from triderm_dist.engine.step import TrainStep
    from triderm_dist.losses import CompoundLoss, Sums

METHODS = ("exact", "previous", "per micro-batch")
TIMED = METHODS[:2]
"""Those that the engine has."""


class SumsRun(Section):
    shards: str = Field("runs/demo/shards/train", description="packed shards to train on")
    steps: int = Field(24, ge=2, description="optimizer steps")
    global_batch: int = Field(32, ge=2, description="lesions per step")
    micro_batch: int = Field(8, ge=1, description="lesions at once")
    tower: str = Field("timm:vit_tiny_patch16_224", description="tower with random weights")
    image_size: int = Field(64, ge=32, description="input side in pixels")


def main(settings: SumsRun) -> None:
    training = open_training(settings)
    errors: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in TIMED}
    previous = None
    for number, batch in enumerate(global_batches(training, settings)):
        training.network.train()
        expected, now = training.undivided_gradient(batch), training.sums_of(batch)
        for method, sums in zip(METHODS, (now, previous, None), strict=True):
            if method != "previous" or previous is not None:
                errors[method].append(difference(training.split_gradient(batch, sums), expected))
        for order in range(2):
            method = TIMED[(number + order) % 2]
            training.set_rate(training.model.train.optim.lr if order else 0.0)  # both are timed, one changes weights
            started = time.perf_counter()
            training.steps[method](batch, number, now)
            seconds[method].append(time.perf_counter() - started)
        previous = now
    print_results(settings, errors, {method: statistics.median(values) for method, values in seconds.items()})


def experiment_of(settings: SumsRun) -> Experiment:
    """Return the experiment whose model `m` is trained."""
    from triderm_dist.config import Experiment, load

    return load(
        Experiment,
        None,
        [
            f"models.m.tower={{source: '{settings.tower}', pretrained: false, image_size: {settings.image_size}}}",
            *("models.m.tower.freeze_clinical=0", "models.m.tower.freeze_dermoscopic=0", "models.m.width=192"),
            *("models.m.dropout=0", "train.precision=fp32", f"train.global_batch={settings.global_batch}"),
            f"train.micro_batch={settings.micro_batch}",
        ],
    )


def open_training(settings: SumsRun) -> Training:
    """Build the network, its optimizer, and the engine's step with each source of sums."""
    import numpy as np
    import torch

    from triderm_dist.data.shards.index import read_index
    from triderm_dist.distributed import parallel
    from triderm_dist.engine.finite import NonFiniteGuard
    from triderm_dist.engine.fold import new_network
    from triderm_dist.engine.model_inputs import open_inputs
    from triderm_dist.engine.model_tower import training_tower
    from triderm_dist.engine.step import TrainStep
    from triderm_dist.losses import CompoundLoss
    from triderm_dist.optim import build_optimizer
    from triderm_dist.schema import ConfigError

    if not Path(settings.shards).exists():
        raise ConfigError(f"shards: {settings.shards} is missing; run make demo, or name other packed shards")
    index, experiment = read_index(settings.shards), experiment_of(settings)
    model = experiment.models["m"]
    accelerator = parallel.start_training(model.train)
    model_inputs = open_inputs(experiment, model, index, accelerator, training_tower(experiment, model, index))
    torch.manual_seed(0)
    network = new_network(model, model_inputs)
    loss = CompoundLoss(model.train.loss, model.head, np.bincount(index.labels, minlength=len(index.diagnoses)))
    wrapped, prepared, optimizer = parallel.wrap(
        accelerator, network, lambda net: build_optimizer(net, model.train.optim), model.train
    )
    guard = NonFiniteGuard(accelerator, optimizer)
    configs = {
        method: model.train.model_copy(update={"loss": model.train.loss.model_copy(update={"soft_f1_sums": method})})
        for method in TIMED
    }
    steps = {
        method: TrainStep(accelerator, wrapped, prepared, loss, config, guard) for method, config in configs.items()
    }
    return Training(model, model_inputs, wrapped, optimizer, loss, steps, accelerator.device)


def global_batches(training: Training, settings: SumsRun) -> Iterator[Any]:
    """Yield `settings.steps` complete global batches, epoch after epoch."""
    import numpy as np

    from triderm_dist.data.plan import EpochPlan, Samples, Sampling

    loaders, left, epoch = training.model_inputs.loaders, settings.steps, 0
    samples = Samples.of(loaders.index, np.arange(len(loaders.index)))
    while True:
        plan = EpochPlan(samples, Sampling(), 0, epoch).batches(0, 1, settings.global_batch)
        augment = training.model.train.augment
        for batch in loaders.create(plan, settings.micro_batch, training.device, augment=augment, epoch=epoch):
            if not left:
                return
            if batch.count == settings.global_batch:
                yield batch
                left -= 1
        epoch += 1


@dataclass
class Training:
    """A network in training. steps: the engine's step with each source of sums."""

    model: ModelConfig
    model_inputs: ModelInputs
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: CompoundLoss
    steps: dict[str, TrainStep]
    device: torch.device

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of all parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def undivided_gradient(self, batch: Any) -> torch.Tensor:
        """Return the gradient by the plain formulas: all micro-batches' outputs first, then one loss."""
        import torch

        from triderm_dist.engine.evaluate import forward
        from triderm_dist.losses import focal_loss, soft_f1_loss

        config, head = self.model.train.loss, self.model.head
        outputs = [forward(self.network, each) for each in batch.micro_batches]
        labels = torch.cat([each.labels for each in batch.micro_batches])
        total = torch.zeros(())
        heads = zip(*(output.heads for output in outputs), strict=True)
        for weight, logits in zip((1.0, *[config.aux_weight] * 2), map(torch.cat, heads), strict=False):
            focal, soft_f1 = focal_loss(logits, labels, head).mean(), soft_f1_loss(logits, labels, head)
            total = total + weight * (config.focal_weight * focal + config.soft_f1_weight * soft_f1)
        total.backward()
        return self._take_gradient()

    def split_gradient(self, batch: Any, sums: Sums | None) -> torch.Tensor:
        """Return the gradient of one backward pass a micro-batch, with given sums; None: with those of each."""
        from triderm_dist.engine.evaluate import forward

        for each in batch.micro_batches:
            outputs = forward(self.network, each)
            own = self.loss.sums(outputs, each)
            if sums is not None:
                part = self.loss.surrogate(own, self.loss.slopes(sums, batch.count))
            else:
                slopes = self.loss.slopes(own, int(each.valid.sum()))
                part = self.loss.surrogate(own, slopes) / len(batch.micro_batches)
            part.backward()
        return self._take_gradient()

    def sums_of(self, batch: Any) -> Sums:
        """Return the sums over a global batch, without gradients."""
        import torch

        from triderm_dist.engine.evaluate import forward

        with torch.no_grad():
            parts = [self.loss.sums(forward(self.network, each), each) for each in batch.micro_batches]
        return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}

    def _take_gradient(self) -> torch.Tensor:
        import torch

        gradients = [p.grad for p in self.network.parameters()]
        found = torch.cat([each.flatten() for each in gradients if each is not None])
        self.optimizer.zero_grad()
        return found


def difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the relative error of a gradient, and the cosine of its angle to the expected one."""
    import torch

    cosine = torch.nn.functional.cosine_similarity(actual.double(), expected.double(), dim=0)
    return float((actual - expected).norm() / expected.norm()), float(cosine)


def print_results(
    settings: SumsRun, errors: dict[str, list[tuple[float, float]]], seconds_per_step: dict[str, float]
) -> None:
    """Print the medians over steps, and as the last line the JSON object."""
    print(f"global batch {settings.global_batch} in micro-batches of {settings.micro_batch}, {settings.steps} steps")
    print(f"{'soft F1 sums':<26} {'gradient error':>14} {'cosine':>8} {'s/step':>8}")
    error_of = {}
    for method, found in errors.items():
        error_of[method], cosine = (statistics.median(values) for values in zip(*found, strict=True))
        seconds = seconds_per_step.get(method, float("nan"))
        print(f"{method:<26} {error_of[method]:>14.2e} {cosine:>8.4f} {seconds:>8.3f}")
    result = {
        "exact_error": round(error_of["exact"], 8),
        "previous_error": round(error_of["previous"], 4),
        "own_error": round(error_of["per micro-batch"], 4),
        "exact_cost": round(seconds_per_step["exact"] / seconds_per_step["previous"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run(SumsRun, main, __doc__)
