"""The training loop of one network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from triderm_dist import optim
from triderm_dist.config import TrainConfig
from triderm_dist.data.loader import Loader
from triderm_dist.distributed.collectives import on_main
from triderm_dist.distributed.full_state import Tensors, frozen_parameters, untrained_tensors
from triderm_dist.distributed.parallel import Prepared, check_supported, choose_precision, strategy_of, wrap
from triderm_dist.distributed.stop import Stop
from triderm_dist.engine.checkpoint import Checkpoint, Checkpoints, Training, TrainState
from triderm_dist.engine.ema import build_average
from triderm_dist.engine.epochs import Epochs, TrainingData
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.finite import NonFiniteGuard, damaged_weight
from triderm_dist.engine.fold_folder import FoldFolder
from triderm_dist.engine.graph import build_step, choose_graph, on_graph_stream
from triderm_dist.engine.network_files import read_info
from triderm_dist.engine.step import StepResult
from triderm_dist.files import file_sha256, write_text
from triderm_dist.losses import CompoundLoss, probabilities
from triderm_dist.metrics import argmax_macro_f1, official_macro_f1
from triderm_dist.models.dropout import has_dropout
from triderm_dist.models.network import Network
from triderm_dist.models.tower import tensors_hash
from triderm_dist.monitoring.expectation import Expectation, expect
from triderm_dist.monitoring.flops import TrainingCompute, training_compute
from triderm_dist.monitoring.profiler import profiler
from triderm_dist.monitoring.startup_report import format_report
from triderm_dist.monitoring.throughput import ThroughputMeter
from triderm_dist.monitoring.tracking import Tracker, check_trackers
from triderm_dist.monitoring.train_lines import TrainLines
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import CheckpointError


@dataclass(frozen=True)
class Display:
    """How a training, number `number` of `total` of a run, is printed and tracked.

    run: its name, by which trackers group its trainings.
    brief: omit from the start-up report what all folds of a model have in common.
    in_parallel: print the training's name before every line, since others print at the same time.
    later_seconds: estimates the seconds of all later trainings, given those of this one.
    """

    run: str = ""
    number: int = 1
    total: int = 1
    brief: bool = False
    in_parallel: bool = False
    later_seconds: Callable[[float], float] = lambda seconds: 0.0

    def title(self, name: str) -> str:
        return name if self.total == 1 else f"{name} ({self.number} of {self.total})"

    def prefix(self, name: str) -> str:
        return f"{name} " if self.in_parallel else ""


class Trainer:
    """Trains one network; create it and call `train` once, on all ranks.

    Two trainings with the same settings, data, seed and global batch give the same numbers, up to the order of
    floating-point sums, with any micro-batch (unless batch norms are trained), ranks and strategy. Creating it checks
    all settings, restores the newest checkpoint and wraps the network; nothing is written before `train`.

    Raises ConfigError for settings that cannot work together, CheckpointError for damaged weights.
    """

    def __init__(
        self,
        *,
        name: str,
        network: Network,
        config: TrainConfig,
        data: TrainingData,
        folder: FoldFolder,
        seed: int,
        accelerator: Accelerator,
        epochs: int | None = None,
        display: Display | None = None,
        why_precision: str = "",
    ) -> None:
        """name: of the training in logs.  folder: for weights, checkpoints and logs.
        epochs: number of the schedule's config.epochs to train; None trains all.
        why_precision: reason for the precision of `config`, if it was measured.
        """
        display = display or Display()
        check_supported(accelerator, config)
        self.name, self.config, self.data, self.head = name, config, data, network.config.head
        self.folder, self.accelerator = folder, accelerator
        self.epochs, self.last_epoch = Epochs(config, data, seed), epochs or config.epochs
        epoch_steps = self.epochs.steps[: self.last_epoch]
        heads = 1 + len(data.loaders.index.signature.views)
        drawn = self.epochs.drawn_lesions() if config.loss.logit_adjustment else None
        self.loss = CompoundLoss(config.loss, self.head, self.epochs.class_counts, heads, drawn).to(accelerator.device)
        execution, frozen = execution_settings(config, accelerator, network), on_main(partial(_frozen_hash, network))
        self.checkpoints = Checkpoints(folder.path, folder.resume_hashes, config.keep_last, execution, frozen)
        saved = self._load_newest(network)
        compute = training_compute(network, accelerator.device, accelerator.num_processes, config.peak_tflops)
        graphed, why_graph = choose_graph(accelerator, config, network.config.kind)
        self.expectation = None if display.brief else self._expect(network, compute)
        report = format_report(
            display.title(name), accelerator, config, network, data.counts(), epoch_steps, compute,
            start=saved.state.step if saved else 0, brief=display.brief, why_precision=why_precision,
            why_no_graph="" if graphed else why_graph, rows=self.epochs.rows, expectation=self.expectation,
        )  # fmt: skip
        accelerator.print(report, flush=True)
        untrained = untrained_tensors(network)
        with on_graph_stream(accelerator.device, graphed):
            prepared = wrap(accelerator, network, self._build_optimizer, config)
        self.training = self._begin_or_resume(prepared, untrained, saved)
        self.guard = NonFiniteGuard(accelerator, prepared.torch_optimizer)
        self.step = build_step(accelerator, prepared, self.loss, config, self.guard, graphed)
        state, total = self.training.state, sum(epoch_steps)
        self._speed: tuple[float, float] | None = None  # GiB and lesions/s at the last log line
        self.meter = ThroughputMeter(state.step, total, config.global_batch, accelerator.device, compute)
        self.tracker = self._build_tracker(display, total, has_flops=compute is not None)

    def _expect(self, network: Network, compute: TrainingCompute | None) -> Expectation | None:
        """Return the speed and memory to expect on a GPU; None on a CPU, or where the FLOPs are not known."""
        if compute is None or self.accelerator.device.type != "cuda":
            return None
        half, strategy = self.accelerator.mixed_precision != "no", strategy_of(self.accelerator)
        return expect(network, self.config, compute, half, strategy, self.data.loaders.index.canvas)

    def _begin_or_resume(self, prepared: Prepared, untrained: Tensors, saved: Checkpoint | None) -> Training:
        """Return a training at its first step, or at that of the checkpoint `saved`, whose weights the network has.

        untrained: see `Training`.
        """
        config, optimizer = self.config, prepared.torch_optimizer
        scheduler = optim.build_scheduler(optimizer, config.optim, self.epochs.total_steps, self.epochs.steps[0])
        average = build_average(prepared.network, config)
        training = Training(prepared.network, optimizer, scheduler, average, TrainState(), untrained)
        if saved:
            saved.load_training(self.accelerator, training)
            if config.select == "best":
                self._forget_lost_best(training.state, saved)
            if changes := self.checkpoints.describe_changes(saved):
                self.accelerator.print(wrapped(f"{self.name}: {changes}"), flush=True)
        return training

    def _forget_lost_best(self, state: TrainState, saved: Checkpoint) -> None:
        """Select among the epochs to come if the weights on disk are not those of the best epoch of the checkpoint.

        They are those of a later epoch if the process was killed before its next checkpoint. An unchanged training
        reaches and selects that epoch again; one with changed settings must not keep weights it did not train.
        """
        selected = saved.folder.parents[1] / "weights"
        if state.best_epoch < 0 or on_main(lambda: _is_selected(selected, state.best_epoch, state.best_score)):
            return
        text = f"{self.name}: the weights of the best epoch, {state.best_epoch}, are lost; selecting among later ones"
        self.accelerator.print(wrapped(text), flush=True)
        state.best_score, state.best_epoch = TrainState.best_score, TrainState.best_epoch

    def _build_tracker(self, display: Display, steps: int, has_flops: bool) -> Tracker:
        """Return the tracker of a training of `steps` steps, which shows the MFU if it has FLOPs to compute it from."""
        state = self.training.state
        lines = TrainLines(steps, self.last_epoch, self.loss.names, has_flops, display.prefix(self.name))
        return Tracker(
            self.name, self.folder.path, lines=lines, config=self.config, step=state.step, epoch=state.epoch,
            group=display.run, later_seconds=display.later_seconds,
        )  # fmt: skip

    def _load_newest(self, network: Network) -> Checkpoint | None:
        """Load the newest checkpoint's weights, if there is one, and return it. Raises CheckpointError as `Trainer`."""
        saved = self.checkpoints.newest(on_main(self.folder.resumed))
        if saved:
            saved.load_network(network)
        elif damaged := damaged_weight(network.named_parameters()):
            raise CheckpointError(f"{self.name}: the pretrained weights are damaged: {damaged}; fetch their file again")
        return saved

    def train(
        self,
        stop: Stop,
        on_start: Callable[[], None] = lambda: None,
        on_validation: Callable[[int, dict[str, float]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train to the last epoch and write the selected weights to FOLDER/weights.safetensors.

        Returns the changes of settings between checkpoint and resume: {"step", setting: [before, after]}.
        on_start: called on rank 0 before anything is written.  on_validation: called with (epoch, scores).
        Raises, on all ranks, InputError for a non-finite loss or gradient (the step is not taken), OSError for a file
        that cannot be written, and, after saving, Interrupted if `stop` was requested.
        """
        on_main(lambda: self._begin(on_start))
        state = self.training.state
        with (
            self.tracker,
            profiler(self.folder.path, self.config.profile) as profile,
            self.checkpoints,
            stop.save_on_stop(self._save_at_once),
        ):
            while state.epoch < self.last_epoch:
                loader = self.epochs.loader(state, self.accelerator)
                self.meter.start(loader, state.step)
                mixing = self.epochs.mixing(state)
                self.training.wrapped.train()
                for batch in loader:
                    if mixing:
                        batch = replace(batch, micro_batches=[mixing(each) for each in batch.micro_batches])
                    result = self.step(batch, state.step, self.training.sums)
                    self.training.advance(batch.number, result.sums_of(self.config.global_batch))
                    if state.step % self.config.log_every == 0:
                        self._log(result, loader)
                    profile.step()
                    if self._is_save_due():
                        self.save()
                    stop.check()
                if scores := self._end_epoch(stop):
                    self.tracker.log("validation", state.epoch, state.step, scores)
                if self._is_save_due_at_end():
                    self.save()
                if scores and on_validation:
                    self.checkpoints.wait()
                    on_validation(state.epoch, scores)
        return self.checkpoints.changes

    def save(self) -> None:
        """Start to write a checkpoint. Call on all ranks, between two steps."""
        self._check()
        self.checkpoints.save(self.accelerator, self.training)

    def _check(self) -> None:
        """Raise InputError for a non-finite step, ConfigError for a loss term that is not a function of the batch."""
        self.guard.check()
        self.loss.check_unchanged()

    def _save_at_once(self) -> None:
        self.save()
        self.checkpoints.wait()

    def _is_save_due(self) -> bool:
        """Return whether a checkpoint is due after a step. Call on all ranks."""
        config, step = self.config, self.training.state.step
        if config.save_every and step % config.save_every == 0:
            return True
        return step % config.log_every == 0 and self.checkpoints.is_due(config.save_every_seconds)

    def _is_save_due_at_end(self) -> bool:
        """Return whether a checkpoint is due at the end of an epoch. Call on all ranks."""
        seconds, is_last = self.config.save_every_seconds, self.training.state.epoch == self.last_epoch
        return seconds is None or is_last or self.checkpoints.is_due(seconds)

    def _build_optimizer(self, network: Network) -> torch.optim.Optimizer:
        optimizer = optim.build_optimizer(network, self.config.optim)
        self._groups = optim.describe_groups(optimizer.param_groups)  # DeepSpeed replaces the groups by its own
        return optimizer

    def _begin(self, on_start: Callable[[], None]) -> None:
        """Claim the folder, and write the table of parameter groups."""
        self.folder.claim()
        on_start()
        write_text(self.folder.path / "optimizer.txt", self._groups + "\n")

    def _log(self, result: StepResult, loader: Loader) -> None:
        self._check()
        state = self.training.state
        values = self.loss.values(result.sums, result.count)
        values |= {"lr": float(self.training.scheduler.get_last_lr()[0]), "grad_norm": float(result.grad_norm)}
        values |= self.meter.read(loader, state.step)
        self._speed = values["memory_gib"], values["lesions_per_s"]
        self.tracker.log("train", self.epochs.done(state), state.step, values)

    def _end_epoch(self, stop: Stop) -> dict[str, float]:
        """Validate if it is due, and save the weights if they are selected. Returns the scores, {} if not validated."""
        self._check()
        if self.expectation and self._speed:
            self.accelerator.print(wrapped(f"{self.name}: {self.expectation.compare(*self._speed)}"), flush=True)
            self.expectation = None  # print it once
        state, average, number = self.training.state, self.training.average, self.training.state.epoch + 1
        if average:
            average.after_epoch(number)
        is_last = number == self.last_epoch
        is_scored = (is_last or number % self.config.validate_every == 0) and len(self.data.validation_rows) > 0
        with average.swapped_in() if average and (is_last or is_scored) else nullcontext():
            scores = self._validate(stop) if is_scored else {}
            state.epoch, state.batch = state.epoch + 1, 0
            score = scores.get("macro_f1", TrainState.best_score)
            selects_last = self.config.select == "last"
            if selects_last or score > state.best_score:
                state.best_score, state.best_epoch = score, state.epoch
                if is_last or not selects_last:
                    self._keep_weights(is_scored)
        return scores

    def _validate(self, stop: Stop) -> dict[str, float]:
        data = self.data
        validation = evaluate(
            self.training.wrapped, data.loaders, data.validation_rows, self.accelerator,
            micro_batch=self.config.micro_batch, after_batch=stop.check, run=self.step.forward, names=("logits",),
        )  # fmt: skip

        def scores() -> dict[str, float]:
            labels = data.loaders.index.labels[validation.rows]
            p = probabilities(torch.from_numpy(validation.logits), self.head).numpy()
            return {"macro_f1": argmax_macro_f1(p, labels), "official": official_macro_f1(p, labels)}

        return on_main(scores)

    def _keep_weights(self, is_scored: bool) -> None:
        """Start to write the selected weights."""
        state = self.training.state
        info: dict[str, float] = {"epoch": state.best_epoch}
        if is_scored:
            info["validation_macro_f1"] = state.best_score
        self.checkpoints.keep_weights(self.accelerator, self.training, **info)


def _is_selected(path: Path, epoch: int, score: float) -> bool:
    """Return whether PATH.safetensors holds the weights of an epoch with this score."""
    try:
        info = read_info(path)
        digest = file_sha256(path.with_suffix(".safetensors"))
    except (CheckpointError, FileNotFoundError):
        return False
    return (info["sha256"], info["epoch"], info.get("validation_macro_f1", score)) == (digest, epoch, score)


def check_train_settings(config: TrainConfig) -> None:
    """Raise ConfigError for an unknown loss term, optimizer, schedule or tracker, or wrong settings of one."""
    CompoundLoss(config.loss, "softmax", np.ones(2))
    optim.check_names(config.optim)
    check_trackers(config)


def execution_settings(config: TrainConfig, accelerator: Accelerator, network: Network) -> dict[str, Any]:
    """Return settings that affect rounding and may change on resume, and code versions (`checkpoint.OLD_EXECUTION`)."""
    return {
        **({"dropout": "by lesion"} if has_dropout(network) else {}),
        **({"order of repeats": "random"} if config.sampling.kind == "balanced" else {}),
        "train.precision": choose_precision(config.precision, accelerator.device)[0],
        "train.gradient_precision": config.gradient_precision,
        "train.micro_batch": config.micro_batch,
        "train.compile": config.compile,
        "train.optim.lr": config.optim.lr,
        "train.optim.min_lr": config.optim.min_lr,
    }


def _frozen_hash(network: Network) -> str | None:
    """Return the SHA-256 of the frozen parameters; None without any."""
    frozen = frozen_parameters(network)
    return tensors_hash(frozen) if frozen else None
