"""The start-up report, and the records and trace of a short run."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from triderm_dist.config import AugmentConfig, Experiment, ModelConfig, TowerConfig, TrainConfig
from triderm_dist.distributed.stop import Stop
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.epochs import TrainingData
from triderm_dist.engine.fold_folder import FoldFolder
from triderm_dist.engine.model_inputs import open_inputs
from triderm_dist.engine.model_tower import training_tower
from triderm_dist.engine.trainer import Trainer
from triderm_dist.models import build_network, build_towers
from triderm_dist.monitoring.flops import training_flops
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.monitoring.startup_report import LesionCounts, format_report, parameters_by_part
from triderm_dist.tasks import milk10k_task

TOWER = TowerConfig(source="timm:test_vit", pretrained=False, image_size=32, freeze_clinical=1, freeze_dermoscopic=0)
LOG_EVERY = 4
SIGNATURE = milk10k_task().signature(("a",))


def settings(**train_settings) -> ModelConfig:
    return ModelConfig(width=32, heads=2, tower=TOWER, train=TrainConfig(**train_settings))


def test_parameter_counts_by_part_cover_every_parameter_once():
    model = settings()
    network = build_network(model, SIGNATURE, build_towers(model.tower))
    counts = parameters_by_part(network)
    assert sum(map(sum, counts.values())) == sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(parameter.numel() for parameter in network.parameters() if not parameter.requires_grad)
    assert counts["tower, clinical"][1] == frozen > 0 and counts["tower, dermoscopic"][1] == 0
    assert {"view alignment", "semantic gating", "pooling", "head", "auxiliary heads", "semantic"} <= set(counts)


def test_report_lists_disabled_options():
    model = settings(global_batch=16, micro_batch=4, compile=True, loss={"soft_f1_sums": "previous"})
    network = build_network(model, SIGNATURE, build_towers(model.tower))
    counts = LesionCounts(3774, 0, 943)
    about = "tri fold 0", Accelerator(cpu=True), model.train, network, counts, [40, 41], None
    lines = format_report(*about, start=7)
    assert all(len(line) <= 80 for line in lines.splitlines())
    text = " ".join(lines.split())
    for expected in (
        "single, 1 rank on ", "fp32 (no GPU)", "3,774 to train, 943 to validate",
        "81 in 2 epochs of 40", "global batch 16 = 1 x 4 x 4", "MFU unavailable: peak FLOP/s of a CPU is unknown",
        "activation checkpointing (train.activation_checkpointing)", "exact loss sums", "loss scaling",
        "tower, clinical: stem and 1 of 6 blocks are frozen (no autograd)", "start resumed at step 7 of 81",
    ):  # fmt: skip
        assert expected in text, expected
    assert "torch.compile" not in text and "fusion" not in text and "mixup" not in text and "padding" not in text
    for rows, advice in (
        (323, "train.global_batch=12 takes as many steps"),  # of 40 x 16, of which 480 are the fewest of micro-batch 4
        (480, "train.global_batch=12 takes as many steps"),
        (481, ""),
    ):
        text = " ".join(format_report(*about, rows=rows).split())
        padded = f"accumulation); {1 - rows / 640:.0%} of an epoch is padding, computed in vain: {advice}"
        assert padded in text if advice else "padding" not in text
    one = model.train.model_copy(update={"micro_batch": 16})
    text = " ".join(format_report(*about[:2], one, *about[3:], rows=323).split())
    assert "computed in vain: train.global_batch=9 with train.micro_batch=9 takes as many steps" in text
    never = model.train.model_copy(update={"augment": AugmentConfig(mixup=0.4), "epochs": 3})
    text = " ".join(format_report(*about[:2], never, *about[3:]).split())
    assert "mixup and CutMix (train.augment.unmixed_epochs: the last 3 epochs)" in text
    assert "decay of the learning rate (train.optim.warmup_epochs: 3, all epochs)" in text
    assert format_report(*about, start=7, brief=True).splitlines() == [
        "tri fold 0",
        "  lesions    3,774 to train, 943 to validate",
        "  steps      81 in 2 epochs of 40",
        "  start      resumed at step 7 of 81",
    ]


def test_start_reports_photos_of_a_different_size(tmp_path, capsys):
    index = synthetic_shards(tmp_path / "shards", 11, 40)
    (size,) = index.photo_sizes
    mixed = replace(index, photo_sizes={size: 20, (9, 12): 2}, shared_photos=(("A", "B"),))
    for each in (index, mixed):
        tower = training_tower(Experiment(), settings(), each)
        open_inputs(Experiment(), settings(), each, Accelerator(cpu=True), tower)
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("note: ") == 2
    assert f"note: 2 of 22 photos are not {size[0]}x{size[1]}" in output and "A and B" in output


class _Syncs(TorchDispatchMode):
    """Counts synchronizations of the host with a device: numbers read from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A profiled run of 2 epochs: (folder, FLOPs per lesion, cumulative numbers read from tensors at each step)."""
    folder = tmp_path_factory.mktemp("run")
    index = synthetic_shards(folder / "shards", 64, 40)
    model = settings(
        epochs=2,
        global_batch=8,
        micro_batch=8,
        log_every=LOG_EVERY,
        profile=2,
        peak_tflops=0.5,
        optim={"warmup_epochs": 0},
    )
    accelerator = Accelerator(cpu=True)
    opened = open_inputs(Experiment(), model, index, accelerator, training_tower(Experiment(), model, index))
    network = build_network(model, index.signature, build_towers(model.tower))
    flops = training_flops(network)
    rows, reads = np.arange(56), []
    data = TrainingData(opened.training, rows, opened.loaders, np.arange(56, 64))
    with _Syncs() as syncs:
        network.register_forward_pre_hook(lambda *_: reads.append(syncs.count))
        Trainer(
            name="tri",
            network=network,
            config=model.train,
            data=data,
            folder=FoldFolder(folder, ["x"], ["x"]),
            seed=0,
            accelerator=accelerator,
        ).train(Stop())
    return folder, flops, reads


def test_metrics_records_have_the_documented_keys(run):
    folder, flops, _ = run
    first, *_ = records = [each for each in read_metrics(folder / "metrics.jsonl") if each["kind"] == "train"]
    assert [each["step"] for each in records] == list(range(LOG_EVERY, records[-1]["step"] + 1, LOG_EVERY))
    assert set(first) == {
        "kind", "epoch", "step", "loss", "focal", "soft_f1", "aux", "lr", "grad_norm", "lesions_per_s", "data_wait",
        "memory_gib", "seconds", "seconds_left", "mfu",
    }  # fmt: skip
    assert first["mfu"] == pytest.approx(first["lesions_per_s"] * flops / 0.5e12)


def test_trace_contains_the_requested_steps(run):
    folder, *_ = run
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == 2
    assert any("scaled_dot_product" in str(event.get("name")) for event in events)


def test_host_synchronizes_with_the_device_only_to_log(run):
    _, _, reads = run
    per_step = [after - before for before, after in pairwise(reads[1:8])]  # the first forward counted FLOPs
    # The one read per step is the stop flag, which is on the CPU.
    assert [each for number, each in enumerate(per_step, 1) if number != LOG_EVERY] == [1] * 5
    assert per_step[LOG_EVERY - 1] > 1
