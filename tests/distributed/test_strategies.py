"""A training stopped and resumed under each strategy in turn equals an uninterrupted one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import WORKERS, launch
from triderm_dist.monitoring.metrics_log import read_metrics

WORKER = str(WORKERS / "relay_worker.py")
SETTINGS = """
data: {folds: 2}
train:
  epochs: 7
  global_batch: 16
  micro_batch: 4
  log_every: 1
  sampling: {kind: shuffle}
  optim: {lr: 1e-4, warmup_epochs: 1}
models:
  tri:
    width: 32
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 4, freeze_dermoscopic: 3}
"""
STRATEGIES = ["single", "ddp", "deepspeed_zero3", "fsdp2", "deepspeed_zero2", "deepspeed_zero1", "single"]
WITH_EMA = ("single", "ddp", "fsdp2")
NON_FINITE = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")


@pytest.fixture(scope="module")
def settings(packed, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(SETTINGS)
    return {"config": str(file), "settings": [f"data.shards={packed}"]}


def job(settings: dict, output: Path, *overrides: str, stop: int | None = None) -> dict:
    return {**settings, "settings": [*settings["settings"], f"output={output}", *overrides], "stop": stop}


def run(folder: Path, strategy: str, jobs: list[dict]) -> list[str]:
    """Run the jobs under a strategy; return their results, which are equal on all ranks."""
    folder.mkdir()
    ranks, config = (1, None) if strategy == "single" else (2, f"accelerate_configs/{strategy}.yaml")
    launch(WORKER, str(folder), json.dumps(jobs), ranks=ranks, config=config)
    ends = [json.loads((folder / f"relay-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(end == ends[0] for end in ends)
    return ends[0]


@pytest.fixture(scope="module")
def relay(settings, tmp_path_factory) -> dict[str, Path]:
    """Run folders by name. The last resume and the uninterrupted trainings share a process, to import only once."""
    folder = tmp_path_factory.mktemp("relay")
    plain, with_ema = folder / "plain", folder / "ema"
    ema = "train.ema_decay=0.8"
    for number, strategy in enumerate(STRATEGIES[:-1]):
        jobs = [job(settings, plain, stop=0 if strategy == "single" else 1)]
        if strategy in WITH_EMA:
            jobs.append(job(settings, with_ema, ema, stop=0))
        if strategy in NON_FINITE:
            jobs.append(job(settings, folder / f"non-finite-{strategy}", "train.optim.lr=1e30", "train.optim.min_lr=0"))
        ends = run(folder / f"{number}-{strategy}", strategy, jobs)
        stopped = 2 if strategy in WITH_EMA else 1
        assert all(end.startswith("Interrupted") for end in ends[:stopped]), (strategy, ends)
        for end in ends[stopped:]:
            assert "loss or gradient is not finite; the step was not taken" in end, strategy
    uninterrupted = [job(settings, folder / "uninterrupted"), job(settings, folder / "uninterrupted-ema", ema)]
    jobs = [job(settings, plain), job(settings, with_ema, ema), *uninterrupted]
    assert run(folder / "last", "single", jobs) == ["done"] * 4
    return {path.name: path / "tri" / "fold-0" for path in folder.iterdir()}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("name", ["", "-ema"])
def test_resume_under_every_strategy_equals_one_process(relay, name):
    got, expected = losses(relay[name[1:] or "plain"]), losses(relay[f"uninterrupted{name}"])
    assert [step for step, _ in got] == [step for step, _ in expected] == list(range(1, 29))
    for (step, loss), (_, uninterrupted) in zip(got, expected, strict=True):
        assert loss == pytest.approx(uninterrupted, rel=1e-5), step
    runs = (name[1:] or "plain", f"uninterrupted{name}")
    weights, other = (load_file(relay[run] / "weights.safetensors") for run in runs)
    assert weights.keys() == other.keys()
    assert not any(key.startswith(("module.", "_orig_mod.")) or "_checkpoint" in key for key in weights)
    for key, tensor in weights.items():
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point()
        torch.testing.assert_close(tensor, other[key], atol=1e-4, rtol=0, msg=key)


def test_ema_changes_the_evaluated_weights_but_no_loss(relay):
    runs = ("uninterrupted", "uninterrupted-ema")
    plain, averaged = (load_file(relay[run] / "weights.safetensors") for run in runs)
    assert losses(relay["uninterrupted"]) == losses(relay["uninterrupted-ema"])
    assert any(not torch.equal(plain[key], averaged[key]) for key in plain)


@pytest.mark.parametrize("strategy", NON_FINITE)
def test_non_finite_step_is_neither_applied_nor_saved(relay, strategy):
    folder = relay[f"non-finite-{strategy}"]
    assert not (folder / "weights.safetensors").exists()
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


def test_optimizer_groups_are_saved(relay):
    table = (relay["plain"] / "optimizer.txt").read_text()
    assert "depth 0, decay" in table and "weight decay" in table


@pytest.mark.parametrize(
    ("strategy", "override", "message"),
    [
        ("deepspeed_zero2", "train.ema_decay=0.9", "train.ema_decay: not supported with DeepSpeed"),
        ("deepspeed_zero2", "train.swa_epochs=1", "train.swa_epochs: not supported with DeepSpeed"),
        ("deepspeed_zero2", "train.optim.settings={amsgrad: true}", "train.optim.name: DeepSpeed flattens the weights"),
        ("deepspeed_zero3_offload", "seed=0", "offloading to the host needs a GPU"),
    ],
)
def test_unsupported_combinations_are_refused(settings, tmp_path, strategy, override, message):
    done = launch(
        "launch.train",
        "--config",
        settings["config"],
        *settings["settings"],
        f"output={tmp_path}",
        override,
        config=f"accelerate_configs/{strategy}.yaml",
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero2"])
def test_out_of_memory_on_one_rank_halves_the_micro_batch_of_all(settings, tmp_path, strategy):
    worker = str(WORKERS / "oom_worker.py")
    arguments = ["--config", settings["config"], *settings["settings"], f"output={tmp_path}", "train.epochs=1"]
    done = launch(worker, "1", *arguments, "train.micro_batch=8", ranks=2, config=f"accelerate_configs/{strategy}.yaml")
    assert "micro-batch 4 instead of 8 and 2 times the accumulation steps" in " ".join(done.stdout.split())
    folder = tmp_path / "tri" / "fold-0"
    assert len(losses(folder)) == 4 and (folder / "fold.json").exists()


def test_out_of_memory_in_one_process(settings, tmp_path):
    arguments = ["--config", settings["config"], *settings["settings"], f"output={tmp_path}", "train.epochs=1"]
    done = launch(str(WORKERS / "oom_worker.py"), "0", *arguments, "train.micro_batch=16")
    printed = " ".join(done.stdout.split())
    assert "micro-batch 8 instead of 16" in printed and "micro-batch 4 instead of 8" in printed
    assert json.loads((tmp_path / "tri" / "fold-0" / "micro_batch.json").read_text())["micro_batch"] == 4


LOW, LESS, COMPILED = "train.precision=bf16", "train.activation_checkpointing=true", "train.compile=true"
COMBINED = {
    "ddp": ["", f"{LESS} {COMPILED} {LOW}"],
    "fsdp2": ["", LOW, f"{LESS} {COMPILED} {LOW}"],
    "deepspeed_zero1": ["", LOW],
    "deepspeed_zero2": ["", f"{LESS} {LOW}"],
    "deepspeed_zero3": ["", LESS, LOW],
}
"""Compiling takes a minute for each precision and micro-batch; test_one_global_batch.py compiles in float32."""


SHORT = ("train.epochs=2", "models.tri.dropout=0.2")


@pytest.fixture(scope="module")
def begun(settings, tmp_path_factory) -> dict[str, Path]:
    """Folders of trainings that one process, without options, stopped after the first of two epochs, by precision."""
    folder = tmp_path_factory.mktemp("begun")
    runs = {"": folder / "fp32", LOW: folder / "bf16"}
    jobs = [job(settings, path, *SHORT, *precision.split(), stop=0) for precision, path in runs.items()]
    assert all(end.startswith("Interrupted") for end in run(folder / "single", "single", jobs))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("strategy", COMBINED)
def test_combined_options_resume_a_one_process_checkpoint(settings, begun, tmp_path, strategy):
    """Resume a one-process checkpoint of the same precision with combined options; losses stay close.

    Compiled blocks must draw the same dropout masks as eager ones: the exact soft F1 sums rely on it.
    """
    jobs = []
    for number, options in enumerate(COMBINED[strategy]):
        output = shutil.copytree(begun[LOW if LOW in options else ""], tmp_path / str(number))
        jobs.append(job(settings, output, *SHORT, *options.split()))
    assert run(tmp_path / "resumed", strategy, jobs) == ["done"] * len(jobs)
    plain, *others = (losses(tmp_path / str(number) / "tri" / "fold-0") for number in range(len(jobs)))
    assert [step for step, _ in plain] == list(range(1, 9))
    for options, other in zip(COMBINED[strategy][1:], others, strict=True):
        for (step, loss), (_, expected) in zip(other, plain, strict=True):
            assert loss == pytest.approx(expected, rel=0.02), (options, step)
