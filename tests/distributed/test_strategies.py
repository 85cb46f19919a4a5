"""One training handed from one way to run to the next, asked to stop on the way, beside the undisturbed one."""

import json
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
  epochs: 8
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
LEGS = ["single", "ddp", "deepspeed_zero3", "fsdp2", "deepspeed_zero2", "deepspeed_zero1", "single"]
AVERAGED = ("single", "ddp", "fsdp2")
POISONED = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")


@pytest.fixture(scope="module")
def settings(packed, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(SETTINGS)
    return {"config": str(file), "settings": [f"data.shards={packed}"]}


def job(settings: dict, output: Path, *overrides: str, stop: int | None = None) -> dict:
    return {**settings, "settings": [*settings["settings"], f"output={output}", *overrides], "stop": stop}


def run(folder: Path, way: str, jobs: list[dict]) -> list[str]:
    """How the jobs ended, the same on every rank."""
    folder.mkdir()
    ranks, config = (1, None) if way == "single" else (2, f"accelerate_configs/{way}.yaml")
    launch(WORKER, str(folder), json.dumps(jobs), ranks=ranks, config=config)
    ends = [json.loads((folder / f"relay-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(end == ends[0] for end in ends)
    return ends[0]


@pytest.fixture(scope="module")
def relay(settings, tmp_path_factory) -> dict[str, Path]:
    """The last leg and the undisturbed run end in one process, so that it pays for its imports once."""
    folder = tmp_path_factory.mktemp("relay")
    plain, averaged = folder / "plain", folder / "averaged"
    average = "train.ema_decay=0.8"
    for number, way in enumerate(LEGS[:-1]):
        jobs = [job(settings, plain, stop=0 if way == "single" else 1)]
        if way in AVERAGED:
            jobs.append(job(settings, averaged, average, stop=0))
        if way in POISONED:
            jobs.append(job(settings, folder / f"poisoned-{way}", "train.optim.lr=1e30", "train.optim.min_lr=0"))
        ends = run(folder / f"{number}-{way}", way, jobs)
        stopped = 2 if way in AVERAGED else 1
        assert all(end.startswith("Interrupted") for end in ends[:stopped]), (way, ends)
        for end in ends[stopped:]:
            assert "loss or gradient is not finite; the step was not taken" in end, way
    undisturbed = [job(settings, folder / "undisturbed"), job(settings, folder / "undisturbed-averaged", average)]
    jobs = [job(settings, plain), job(settings, averaged, average), *undisturbed]
    assert run(folder / "last", "single", jobs) == ["done"] * 4
    return {path.name: path / "tri" / "fold-0" for path in folder.iterdir()}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("name", ["", "-averaged"])
def test_handed_from_way_to_way_the_numbers_are_those_of_one_process(relay, name):
    got, expected = losses(relay[name[1:] or "plain"]), losses(relay[f"undisturbed{name}"])
    assert [step for step, _ in got] == [step for step, _ in expected] == list(range(1, 33))
    for (step, loss), (_, undisturbed) in zip(got, expected, strict=True):
        assert loss == pytest.approx(undisturbed, rel=1e-5), step
    runs = (name[1:] or "plain", f"undisturbed{name}")
    weights, other = (load_file(relay[run] / "weights.safetensors") for run in runs)
    assert weights.keys() == other.keys()
    assert not any(key.startswith(("module.", "_orig_mod.")) or "_checkpoint" in key for key in weights)
    for key, tensor in weights.items():
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point()
        torch.testing.assert_close(tensor, other[key], atol=1e-4, rtol=0, msg=key)


def test_averaged_weights_are_other_weights(relay):
    runs = ("undisturbed", "undisturbed-averaged")
    plain, averaged = (load_file(relay[run] / "weights.safetensors") for run in runs)
    assert losses(relay["undisturbed"]) == losses(relay["undisturbed-averaged"])  # the average only watches
    assert any(not torch.equal(plain[key], averaged[key]) for key in plain)


@pytest.mark.parametrize("way", POISONED)
def test_a_bad_step_is_never_taken_nor_saved(relay, way):
    folder = relay[f"poisoned-{way}"]
    assert not (folder / "weights.safetensors").exists()
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


def test_the_optimizers_groups_are_told(relay):
    table = (relay["plain"] / "optimizer.txt").read_text()
    assert "depth 0, decay" in table and "weight decay" in table


@pytest.mark.parametrize(
    ("way", "override", "message"),
    [
        ("deepspeed_zero2", "train.ema_decay=0.9", "train.ema_decay: DeepSpeed keeps the fp32 weights to itself"),
        ("deepspeed_zero3_offload", "seed=0", "offload moves weights from a GPU to the host, and there is no GPU"),
    ],
)
def test_what_cannot_work_together_is_refused(settings, tmp_path, way, override, message):
    done = launch(
        "launch.train", "--config", settings["config"], *settings["settings"], f"output={tmp_path}", override,
        config=f"accelerate_configs/{way}.yaml", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("way", ["ddp", "deepspeed_zero2"])
def test_out_of_memory_on_one_rank_makes_all_go_on_with_half_the_micro_batch(settings, tmp_path, way):
    cramped = str(WORKERS / "oom_worker.py")
    arguments = ["--config", settings["config"], *settings["settings"], f"output={tmp_path}", "train.epochs=1"]
    done = launch(cramped, "1", *arguments, "train.micro_batch=8", ranks=2, config=f"accelerate_configs/{way}.yaml")
    assert "micro-batch 4 instead of 8, accumulation 2 times as long" in done.stdout
    folder = tmp_path / "tri" / "fold-0"
    assert len(losses(folder)) == 4 and (folder / "fold.json").exists()


def test_out_of_memory_alone(settings, tmp_path):
    arguments = ["--config", settings["config"], *settings["settings"], f"output={tmp_path}", "train.epochs=1"]
    done = launch(str(WORKERS / "oom_worker.py"), "0", *arguments, "train.micro_batch=16")
    assert "micro-batch 8 instead of 16" in done.stdout and "micro-batch 4 instead of 8" in done.stdout
    assert json.loads((tmp_path / "tri" / "fold-0" / "micro_batch.json").read_text())["micro_batch"] == 4


LOW, LESS, COMPILED = "train.precision=bf16", "train.activation_checkpointing=true", "train.compile=true"
COMBINED = {
    "ddp": ["", COMPILED, f"{LESS} {COMPILED} {LOW}"],
    "fsdp2": ["", LOW, f"{LESS} {COMPILED} {LOW}"],
    "deepspeed_zero1": ["", LOW],
    "deepspeed_zero2": ["", f"{LESS} {LOW}", COMPILED],
    "deepspeed_zero3": ["", LESS, LOW],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", COMBINED)
def test_options_combined(settings, tmp_path, way):
    """Each resumes from the checkpoint of one process in the same precision. Compiled blocks draw dropout as eager ones
    do: the exact soft F1 sums rely on it.
    """
    names = [f"{number}" for number, _ in enumerate(COMBINED[way])]
    jobs = [
        job(settings, tmp_path / name, "train.epochs=2", "models.tri.dropout=0.2", *overrides.split())
        for name, overrides in zip(names, COMBINED[way], strict=True)
    ]
    begun = [{**each, "stop": 0} for each in jobs]
    assert all(end.startswith("Interrupted") for end in run(tmp_path / "begin", "single", begun))
    assert run(tmp_path / "go-on", way, jobs) == ["done"] * len(jobs)
    plain = dict(losses(tmp_path / "0" / "tri" / "fold-0"))
    for name in names:
        for step, loss in losses(tmp_path / name / "tri" / "fold-0"):
            assert loss == pytest.approx(plain[step], rel=0.02), (COMBINED[way][int(name)], step)
