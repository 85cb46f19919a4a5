"""Training of one network: the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import TrainConfig, flat
from triderm_dist.data.loader import Loader, ViewSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed.collectives import all_reduce_sum, on_main
from triderm_dist.distributed.full_state import full_weights
from triderm_dist.distributed.parallel import check_supported, choose_precision, wrap
from triderm_dist.distributed.stop import Stop
from triderm_dist.engine.checkpoint import Checkpoints, Training, TrainState, save_weights
from triderm_dist.engine.ema import Ema
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.finite import Finite
from triderm_dist.engine.fold_folder import FoldFolder
from triderm_dist.engine.step import train_step
from triderm_dist.files import write_text
from triderm_dist.losses import CompoundLoss, Head, probabilities
from triderm_dist.metrics import argmax_macro_f1, official_macro_f1
from triderm_dist.models.network import Network
from triderm_dist.monitoring.flops import budget
from triderm_dist.monitoring.profiler import profiler
from triderm_dist.monitoring.startup_report import report
from triderm_dist.monitoring.throughput import ThroughputMeter
from triderm_dist.monitoring.tracking import Tracker
from triderm_dist.optim import build_optimizer, build_scheduler, describe_groups
from triderm_dist.schema import DIAGNOSES


@dataclass(frozen=True)
class TrainingData:
    """A packed set, where its views come from, and the index rows (N,) that are trained on and validated on."""

    index: ShardIndex
    source: ViewSource
    train_rows: np.ndarray
    validation_rows: np.ndarray
    workers: int
    prefetch: int


def train(
    name: str,
    network: Network,
    head: Head,
    config: TrainConfig,
    data: TrainingData,
    accelerator: Accelerator,
    place: FoldFolder,
    seed: int,
    stop: Stop,
    on_start: Callable[[], None] = lambda: None,
    on_validation: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train `network` and leave the selected weights in FOLDER/weights.safetensors, the optimizer's groups in
    FOLDER/optimizer.txt, FOLDER being place.path; resumes from FOLDER/checkpoints. Returns what changed on the way:
    {"step", setting: [before, after]} of each start that went on with another learning rate or way to compute.

    Call on all ranks. Two runs with the same stamp (settings and data), seed, micro-batch and global batch give the
    same numbers, on any number of ranks up to the order of floating-point sums. `on_start` is called on rank 0 when the
    settings have passed all checks; before it nothing is written. `on_validation` is told (epoch, scores). Raises
    ConfigError for settings that can't work together, InputError for a loss or gradient that is not finite (the step is
    not taken), OSError for a file that can't be written, all on all ranks; Interrupted after saving where `stop` was
    asked to.
    """
    check_supported(accelerator, config)
    plans = _Plans(config, data, seed)
    labels = data.index.labels[data.validation_rows]
    loss = CompoundLoss(config.loss, head, plans.class_counts).to(accelerator.device)
    folder, how = place.path, how_of(config, accelerator)
    checkpoints = Checkpoints(folder, place.identity, config.keep_last, how)
    saved = checkpoints.newest(on_main(place.found))
    if saved:
        saved.into_network(network)
    compute = budget(network, accelerator.device, accelerator.num_processes, config.peak_tflops)
    lesions = len(data.train_rows), len(data.validation_rows)
    accelerator.print(report(name, accelerator, config, network, lesions, plans.steps, compute))
    groups: list[str] = []
    build = partial(_build_optimizer, config=config, groups=groups)
    wrapped, prepared, optimizer = wrap(
        accelerator, network, build, config.activation_checkpointing, config.compile
    )  # fmt: skip
    scheduler = build_scheduler(optimizer, config.optim, plans.total_steps, plans.steps[0])
    average = Ema(wrapped, config.ema_decay) if config.ema_decay else None
    training = Training(wrapped, optimizer, scheduler, average, TrainState())
    if saved:
        saved.into_training(accelerator, training)
    state, finite = training.state, Finite(accelerator, optimizer)
    meter = ThroughputMeter(state.step, plans.total_steps, config.global_batch, accelerator.device, compute)
    tracker = Tracker(
        name, folder, accelerator.is_main_process, epochs=config.epochs, total_steps=plans.total_steps, step=state.step,
        epoch=state.epoch, trackers=config.trackers, settings=flat(config.model_dump(mode="json")),
    )  # fmt: skip

    if saved and (news := checkpoints.news(saved)):
        accelerator.print(f"{name} {news}")

    def begin() -> None:
        place.take()
        on_start()
        write_text(folder / "optimizer.txt", groups[0] + "\n")

    on_main(begin)

    def save() -> None:
        finite.check()
        checkpoints.save(accelerator, training)

    with tracker, profiler(folder, config.profile, accelerator.is_main_process) as profile, stop.saves(save):
        while state.epoch < config.epochs:
            loader = plans.loader(state, accelerator)
            meter.start(loader, state.step)
            wrapped.train()
            for step in loader:
                focal, training.sums, norm = train_step(
                    wrapped, loss, prepared, step, accelerator, config, seed, state.step, training.sums, finite
                )
                training.stepped(step.number)
                if state.step % config.log_every == 0:
                    finite.check()
                    values = loss.values(all_reduce_sum(focal), training.sums)
                    values |= {"lr": float(scheduler.get_last_lr()[0]), "grad_norm": float(norm)}
                    values |= meter.read(loader, state.step)
                    tracker.log("train", plans.epochs_done(state), state.step, values)
                profile.step()
                if config.save_every and state.step % config.save_every == 0:
                    save()
                stop.check()

            finite.check()
            with average.in_place() if average else nullcontext():
                validation = evaluate(
                    wrapped, data.index, data.source, data.validation_rows, accelerator, between=stop.check,
                    micro_batch=config.micro_batch, workers=data.workers, prefetch=data.prefetch,
                )  # fmt: skip
                p = probabilities(torch.from_numpy(validation.logits), head).numpy()
                scores = {"macro_f1": argmax_macro_f1(p, labels), "official": official_macro_f1(p, labels)}
                state.epoch, state.batch = state.epoch + 1, 0
                if config.select == "last" or scores["macro_f1"] > state.best_score:
                    state.best_score, state.best_epoch = scores["macro_f1"], state.epoch
                    _keep_weights(accelerator, wrapped, folder, state)
            tracker.log("validation", state.epoch, state.step, scores)
            save()
            if on_validation:
                on_validation(state.epoch, scores)
    return checkpoints.changes


def how_of(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Settings that change the numbers of a training and yet may change when it goes on."""
    return {
        "train.precision": choose_precision(config.precision, accelerator.device)[0],
        "train.micro_batch": config.micro_batch,
        "train.compile": config.compile,
        "train.optim.lr": config.optim.lr,
        "train.optim.min_lr": config.optim.min_lr,
    }


class _Plans:
    """The order of every epoch, and the loader of the one that a run is in."""

    def __init__(self, config: TrainConfig, data: TrainingData, seed: int) -> None:
        self.config, self.data, self.seed = config, data, seed
        self._samples = Samples.of(data.index, data.train_rows)
        self._sampling = Sampling(**config.sampling.model_dump())
        self.class_counts = np.bincount(self._samples.labels, minlength=len(DIAGNOSES))
        self.steps = [self._plan(epoch).num_batches(config.global_batch) for epoch in range(config.epochs)]
        self.total_steps = sum(self.steps)

    def loader(self, state: TrainState, accelerator: Accelerator) -> Loader:
        """What is left of the epoch, this rank's part."""
        config, data = self.config, self.data
        batches = self._plan(state.epoch).batches(
            accelerator.process_index, accelerator.num_processes, config.global_batch, start=state.batch
        )
        return Loader(
            data.index, data.source, batches, config.micro_batch, accelerator.device, augment=config.augment,
            seed=self.seed, epoch=state.epoch, workers=data.workers, prefetch=data.prefetch,
        )  # fmt: skip

    def epochs_done(self, state: TrainState) -> float:
        return state.epoch + state.batch / self.steps[state.epoch]

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(self._samples, self._sampling, self.seed, epoch)


def _build_optimizer(network: Network, config: TrainConfig, groups: list[str]) -> torch.optim.Optimizer:
    optimizer = build_optimizer(network, config.optim)
    groups.append(describe_groups(optimizer.param_groups))  # DeepSpeed puts its own in their place
    return optimizer


def _keep_weights(accelerator: Accelerator, wrapped: nn.Module, folder: Path, state: TrainState) -> None:
    """The weights that predict, whole and under canonical keys."""
    weights = full_weights(accelerator, wrapped)
    about = {"epoch": state.best_epoch, "validation_macro_f1": state.best_score}
    on_main(lambda: save_weights(folder / "weights", weights, **about))
