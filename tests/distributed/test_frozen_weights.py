"""Under every strategy LoRA trains as under DDP, and what is not trained keeps its bits, also in 16 bits."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.test_strategies import job, losses, run
from triderm_dist.cli import Interrupted
from triderm_dist.config import Experiment, TowerConfig, load
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.crossval import run_folds
from triderm_dist.files import file_sha256
from triderm_dist.models import build_towers
from triderm_dist.models.lora import merge_lora
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import CheckpointError

SETTINGS = """
data: {folds: 2}
train:
  epochs: 2
  global_batch: 16
  micro_batch: 4
  log_every: 1
  keep_checkpoints: true
  sampling: {kind: shuffle}
  optim: {lr: 1e-3, warmup_epochs: 1}
models:
  tri:
    width: 32
    heads: 2
    tower: {source: "timm:test_vit@FILE", image_size: 32, freeze_clinical: 3, freeze_dermoscopic: 2}
"""
LORA = "models.tri.tower.lora={rank: 3, alpha: 10}"
"""Their quotient has no exact form in 16 bits."""
STRATEGIES = ["ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]
LOW = ["train.precision=bf16", "train.epochs=1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The weight file of a small ViT."""
    import timm

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("source") / "vit.safetensors"
    network = timm.create_model("test_vit")
    save_file({name: torch.randn_like(tensor) / 10 for name, tensor in network.state_dict().items()}, file)
    return file


@pytest.fixture(scope="module")
def settings(packed, source) -> dict:
    file = source.with_name("tiny.yaml")
    file.write_text(SETTINGS.replace("FILE", str(source)))
    return {"config": str(file), "settings": [f"data.shards={packed}"]}


@pytest.fixture(scope="module")
def pretrained(source) -> dict[str, torch.Tensor]:
    config = TowerConfig(source=f"timm:test_vit@{source}", image_size=32, shared=True)
    return build_towers(config)[0].state_dict()


@pytest.fixture(scope="module", params=[pytest.param(strategy, marks=pytest.mark.slow) for strategy in STRATEGIES])
def trained(request, settings, tmp_path_factory) -> dict[str, Path]:
    """Folders of folds by name: LoRA, stopped after one epoch and resumed, and in bf16 without and with LoRA."""
    folder = tmp_path_factory.mktemp(request.param)
    lora = job(settings, folder / "lora", LORA)
    jobs = [{**lora, "stop": 1}, lora]
    jobs += [job(settings, folder / "frozen", *LOW), job(settings, folder / "lora-bf16", LORA, *LOW)]
    ends = run(folder / "ends", request.param, jobs)
    assert ends[0].startswith("Interrupted") and ends[1:] == ["done"] * 3
    return {name: folder / name / "tri" / "fold-0" for name in ("lora", "frozen", "lora-bf16")}


@pytest.fixture(scope="module")
def expected(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    assert run(folder / "ends", "ddp", [job(settings, folder / "lora", LORA)]) == ["done"]
    return folder / "lora" / "tri" / "fold-0"


def test_lora_trains_resumes_and_predicts_as_under_ddp(trained, expected):
    got, wanted = losses(trained["lora"]), losses(expected)
    assert [step for step, _ in got] == [step for step, _ in wanted] == list(range(1, 9))
    for (step, loss), (_, other) in zip(got, wanted, strict=True):
        assert loss == pytest.approx(other, rel=1e-5), step
    weights, others = (load_file(folder / "weights.safetensors") for folder in (trained["lora"], expected))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-4, rtol=0, msg=name)
    own, other = (read_predictions(folder / "predictions.parquet") for folder in (trained["lora"], expected))
    assert own.lesion_ids.tolist() == other.lesion_ids.tolist()
    np.testing.assert_allclose(own.logits, other.logits, atol=1e-3)


def test_frozen_weights_keep_their_bits(trained, pretrained):
    weights, frozen = load_file(trained["frozen"] / "weights.safetensors"), 0
    for view, blocks in (("clinical", 3), ("dermoscopic", 2)):
        parts = ["stem.", *(f"blocks.{number}." for number in range(blocks))]
        for name, tensor in pretrained.items():
            saved = weights[f"towers.{view}.{name}"]
            if name.startswith(tuple(parts)):
                assert torch.equal(saved, tensor), name
                frozen += 1
    assert frozen > 50


def test_lora_is_merged_with_the_weights_of_the_source(trained, pretrained):
    """Checkpoints hold the products alone."""
    folder = trained["lora-bf16"]
    weights = load_file(folder / "weights.safetensors")
    (checkpoint,) = (folder / "checkpoints").glob("epoch-*")
    state = load_file(checkpoint / "weights.safetensors")
    assert {tensor.item() for name, tensor in state.items() if name.endswith(".scale")} == {torch.tensor(10 / 3).item()}
    for view in ("clinical", "dermoscopic"):
        prefix = f"towers.{view}."
        products = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        assert {name.rpartition(".")[2] for name in products} == {"a", "b", "scale"}
        bases = {}
        for name, tensor in pretrained.items():
            module, _, last = name.rpartition(".")
            place = f"{module}.parametrizations.{last}"
            bases[f"{place}.original" if f"{place}.0.a" in products else name] = tensor
        for name, tensor in merge_lora({**bases, **products}).items():
            assert torch.equal(weights[prefix + name], tensor), name


@pytest.fixture
def train(settings, tmp_path):
    """train(stop=epoch or None): train fold 0 with LoRA in this process; return its folder."""
    words = [*settings["settings"], f"output={tmp_path}", LORA, "train.trackers=[]", "train.keep_last=1"]
    experiment = load(Experiment, settings["config"], words)

    def train(stop: int | None = None) -> Path:
        stop_after = lambda epoch, scores: epoch == stop and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        run_folds(experiment, read_index(experiment.train_shards), ["tri"], [0], stop_after)
        return tmp_path / "tri" / "fold-0"

    return train


def interrupted(train, folder: Path) -> Path:
    """Return the only checkpoint of a training that stopped after its first epoch."""
    with pytest.raises(Interrupted):
        train(stop=1)
    (checkpoint,) = (folder / "tri" / "fold-0" / "checkpoints").glob("epoch-*")
    return checkpoint


def test_changed_source_is_refused(train, source, tmp_path):
    checkpoint, before = interrupted(train, tmp_path), source.read_bytes()
    tensors = load_file(source)
    tensors["blocks.0.norm1.bias"][5] += 1e-6
    save_file(tensors, source)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    expected = f"{checkpoint}: the frozen weights of tower.source or init are not those that this training began with"
    try:
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            train()
        assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    finally:
        source.write_bytes(before)
    assert (train() / "fold.json").exists()


def test_checkpoint_of_version_2_brings_its_frozen_weights(train, pretrained, tmp_path):
    checkpoint = interrupted(train, tmp_path)
    file, record = checkpoint / "weights.safetensors", json.loads((checkpoint / "state.json").read_text())
    state = load_file(file)
    size = file.stat().st_size
    for view in ("clinical", "dermoscopic"):
        for name, tensor in pretrained.items():
            module, _, last = name.rpartition(".")
            original = f"{module}.parametrizations.{last}.original"
            is_product = f"towers.{view}.{module}.parametrizations.{last}.0.a" in state
            state.setdefault(f"towers.{view}.{original if is_product else name}", tensor + 1e-3)
    save_file(state, file)
    assert file.stat().st_size > 1.3 * size
    del record["frozen"], record["checksum"]
    record |= {"version": 2, "files": {**record["files"], file.name: file_sha256(file)}}
    (checkpoint / "state.json").write_text(json.dumps(record))
    weights = load_file(train() / "weights.safetensors")
    assert torch.equal(weights["towers.clinical.blocks.0.norm1.bias"], pretrained["blocks.0.norm1.bias"] + 1e-3)
