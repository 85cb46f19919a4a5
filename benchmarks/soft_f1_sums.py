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
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section


class SumsRun(Section):
    shards: str = Field("runs/demo/shards/train", description="packed shards to train on")
    steps: int = Field(24, ge=2, description="optimizer steps")
    global_batch: int = Field(32, ge=2, description="lesions per step")
    micro_batch: int = Field(8, ge=1, description="lesions at once")
    tower: str = Field("timm:vit_tiny_patch16_224", description="tower with random weights")
    image_size: int = Field(64, ge=32, description="input side in pixels")


METHODS = ("exact", "previous", "per micro-batch")


def main(settings: SumsRun) -> None:
    import numpy as np
    import torch

    from triderm_dist.config import Experiment, load
    from triderm_dist.data.plan import EpochPlan, Samples, Sampling
    from triderm_dist.data.shards.index import read_index
    from triderm_dist.distributed import parallel
    from triderm_dist.engine.evaluate import forward
    from triderm_dist.engine.finite import NonFiniteGuard
    from triderm_dist.engine.fold import new_network
    from triderm_dist.engine.step import TrainStep
    from triderm_dist.engine.views import open_views
    from triderm_dist.losses import CompoundLoss, Sums, focal_loss, soft_f1_loss
    from triderm_dist.optim import build_optimizer
    from triderm_dist.schema import ConfigError

    if not Path(settings.shards).exists():
        raise ConfigError(f"shards: {settings.shards} is missing; run make demo, or name other packed shards")
    index = read_index(settings.shards)
    batches = {"train.global_batch": settings.global_batch, "train.micro_batch": settings.micro_batch}
    experiment = load(
        Experiment,
        None,
        [
            f"models.m.tower={{source: '{settings.tower}', pretrained: false, image_size: {settings.image_size}}}",
            "models.m.tower.freeze_clinical=0", "models.m.tower.freeze_dermoscopic=0", "models.m.width=192",
            "models.m.dropout=0", *(f"{key}={value}" for key, value in batches.items()),
        ],
    )  # fmt: skip
    model = experiment.models["m"]
    config = {
        method: model.train.model_copy(update={"loss": model.train.loss.model_copy(update={"soft_f1_sums": method})})
        for method in METHODS[:2]
    }
    accelerator = parallel.start("fp32", settings.micro_batch, settings.global_batch, 1.0)
    views = open_views(experiment, model, index, accelerator, train=True)
    torch.manual_seed(0)
    network = new_network(model, views)
    counts = np.bincount(index.labels, minlength=len(index.diagnoses))
    loss = CompoundLoss(model.train.loss, model.head, counts)
    wrapped, prepared, optimizer = parallel.wrap(
        accelerator, network, lambda net: build_optimizer(net, model.train.optim), False, False
    )
    guard = NonFiniteGuard(accelerator, optimizer)
    train_steps = {
        method: TrainStep(accelerator, wrapped, prepared, loss, settings, guard) for method, settings in config.items()
    }
    trained = [p for p in network.parameters() if p.requires_grad]

    def gradient() -> torch.Tensor:
        found = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        optimizer.zero_grad()
        return found

    def undivided(step) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Return the gradient by the plain formulas: all micro-batches' outputs first, then one loss."""
        outputs = [forward(wrapped, batch) for batch in step.micro_batches]
        labels = torch.cat([batch.labels for batch in step.micro_batches])
        total = torch.zeros(())
        for weight, head in zip((1.0, *[model.train.loss.aux_weight] * 2), range(3), strict=True):
            logits = torch.cat([output[head] for output in outputs])
            part = model.train.loss.focal_weight * focal_loss(logits, labels, model.head).mean()
            total = total + weight * (part + model.train.loss.soft_f1_weight * soft_f1_loss(logits, labels, model.head))
        total.backward()
        return gradient()

    def split(step, sums) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Return the gradient with given sums, or with the sums of each micro-batch if they are None."""
        for batch in step.micro_batches:
            outputs = forward(wrapped, batch)
            part_sums = loss.sums(outputs, batch)
            if sums is not None:
                part = loss.surrogate(part_sums, loss.slopes(sums, step.count))
            else:
                slopes = loss.slopes(part_sums, int(batch.valid.sum()))
                part = loss.surrogate(part_sums, slopes) / len(step.micro_batches)
            part.backward()
        return gradient()

    @torch.no_grad()
    def sums_of(step) -> Sums:  # type: ignore[no-untyped-def]
        parts = [loss.sums(forward(wrapped, batch), batch) for batch in step.micro_batches]
        return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}

    samples = Samples.of(index, np.arange(len(index)))
    errors: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS[:2]}
    previous, number, epoch = None, 0, 0
    while number < settings.steps:
        plan = EpochPlan(samples, Sampling(), 0, epoch).batches(0, 1, settings.global_batch)
        loader = views.loaders.create(
            plan, settings.micro_batch, accelerator.device, augment=model.train.augment, epoch=epoch
        )
        for step in loader:
            if number >= settings.steps or step.count < settings.global_batch:
                break
            wrapped.train()
            expected, now = undivided(step), sums_of(step)
            for method, sums in zip(METHODS, (now, previous, None), strict=True):
                if method == "previous" and previous is None:
                    continue
                actual = split(step, sums)
                cosine = torch.nn.functional.cosine_similarity(actual.double(), expected.double(), dim=0)
                errors[method].append((float((actual - expected).norm() / expected.norm()), float(cosine)))
            for order in range(2):
                method = METHODS[(number + order) % 2]
                rate = model.train.optim.lr if order else 0.0  # both are timed, one step changes the weights
                for group in optimizer.param_groups:
                    group["lr"] = rate
                started = time.perf_counter()
                train_steps[method](step, number, now)
                seconds[method].append(time.perf_counter() - started)
            previous, number = now, number + 1
        epoch += 1
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    print(f"global batch {settings.global_batch} in micro-batches of {settings.micro_batch}, {settings.steps} steps")
    print(f"{'soft F1 sums':<26} {'gradient error':>14} {'cosine':>8} {'s/step':>8}")
    for method, found in errors.items():
        error, cosine = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{method:<26} {error:>14.2e} {cosine:>8.4f} {medians.get(method, float('nan')):>8.3f}")
    error_of = {method: statistics.median(error for error, _ in found) for method, found in errors.items()}
    print(
        json.dumps(
            {
                "exact_error": round(error_of["exact"], 8),
                "previous_error": round(error_of["previous"], 4),
                "own_error": round(error_of[METHODS[2]], 4),
                "exact_cost": round(medians["exact"] / medians["previous"], 3),
            }
        )
    )


if __name__ == "__main__":
    run(SumsRun, main, __doc__)
