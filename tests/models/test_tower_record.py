"""Towers rebuilt from their records, after their files are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.models.test_towers import clip_folder, prefixed, tokens
from triderm_dist.config import TowerConfig
from triderm_dist.models import build_towers
from triderm_dist.models.panderm import build_panderm
from triderm_dist.models.tower import tower_hash
from triderm_dist.models.tower_record import TowerRecord, find_tower, load_tower, read_tower, save_tower
from triderm_dist.models.towers import TOWER_SOURCES, Tower, TowerOptions, TowerSource
from triderm_dist.schema import CheckpointError


def timm_file(folder: Path) -> dict[str, object]:
    save_file(timm.create_model("test_vit").state_dict(), folder / "w.safetensors")
    return {"source": f"timm:test_vit@{folder / 'w.safetensors'}", "image_size": 64}


def open_clip_vit(folder: Path) -> dict[str, object]:
    clip_folder(folder, quick_gelu=False)
    return {"source": f"local-dir:{folder}", "image_size": 48, "quick_gelu": True}


def open_clip_timm(folder: Path) -> dict[str, object]:
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}, "preprocess_cfg": {"mean": [0.1] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = prefixed(timm.create_model("test_vit", num_classes=0).state_dict(), "visual.trunk.")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "open_clip_model.safetensors")
    return {"source": f"local-dir:{folder}"}


def panderm_file(folder: Path) -> dict[str, object]:
    torch.save(
        build_panderm(width=64, depth=3, patch_size=16, image_size=32, mlp_ratio=2.0).state_dict(), folder / "p.pth"
    )
    return {"source": str(folder / "p.pth"), "image_size": 64}


def panderm_in_open_clip(folder: Path) -> dict[str, object]:
    state = build_panderm(width=64, depth=2, patch_size=8, image_size=32).state_dict()
    # The sizes are those of the tensors, not of the config.
    config = {"model_cfg": {"vision_cfg": {"pretrain_path": "gone.pth"}}, "preprocess_cfg": {"std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(prefixed(state, "visual."), folder / "open_clip_model.safetensors")
    return {"source": f"local-dir:{folder}"}


def hub(folder: Path) -> dict[str, object]:
    """Put an open_clip repository into the local cache of the hub, which is empty otherwise."""
    snapshot = folder / "models--someone--clip" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (folder / "models--someone--clip" / "refs").mkdir()
    (folder / "models--someone--clip" / "refs" / "main").write_text("1")
    clip_folder(snapshot)
    return {"source": "hf-hub:someone/clip"}


SOURCES = (timm_file, open_clip_vit, open_clip_timm, panderm_file, panderm_in_open_clip, hub)


@pytest.mark.parametrize("make", SOURCES)
def test_tower_is_rebuilt_without_its_files(
    make: Callable[[Path], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, run = tmp_path / "files", tmp_path / "towers"
    files.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(files))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    config = TowerConfig.model_validate({**make(files), "frozen": True})
    (tower,) = build_towers(config, ("clinical",))
    record = TowerRecord.of(tower, config, tower_hash(tower))
    save_tower(run, record, tower)
    shutil.rmtree(files)
    with pytest.raises(Exception, match=r"files|hf-hub"):
        build_towers(config)

    saved = read_tower(run, record.name)
    assert saved == record and saved.name == record.name
    loaded = load_tower(run, saved)
    x = torch.randn(2, 3, tower.image_size, tower.image_size)
    assert torch.equal(tokens(loaded, x), tokens(tower, x)) and tower_hash(loaded) == tower_hash(tower)
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training

    trained = TowerRecord.of(tower, config)
    built = trained.build()
    built.load_state_dict(tower.state_dict())
    assert torch.equal(tokens(built, x), tokens(tower, x))
    assert (saved.image_size, saved.mean, saved.std, saved.token_shape) == (
        built.image_size, built.mean, built.std, built.token_shape,
    )  # fmt: skip


def frozen(folder: Path, **settings: object) -> tuple[TowerRecord, Tower, TowerConfig]:
    """Save a frozen tower with random weights, and return it with its settings."""
    config = TowerConfig.model_validate(
        {"source": "timm:test_efficientnet", "pretrained": False, "image_size": 32, "frozen": True, **settings}
    )
    tower = build_towers(config)[0]
    record = TowerRecord.of(tower, config, tower_hash(tower))
    save_tower(folder, record, tower)
    return record, tower, config


def test_damaged_and_missing_files_are_refused_in_one_line(tmp_path: Path) -> None:
    record, tower, config = frozen(tmp_path)
    path, weights = tmp_path / f"{record.name}.json", tmp_path / f"{record.name}.safetensors"
    text, content = path.read_text(), bytearray(weights.read_bytes())

    def refusal(name: str) -> str:
        with pytest.raises(CheckpointError, match=f"{name}: .*; ") as error:
            load_tower(tmp_path, read_tower(tmp_path, record.name))
        assert "\n" not in str(error.value)
        return str(error.value)

    weights.write_bytes(content[:-4] + b"\1\2\3\4")
    assert "changed or damaged" in refusal(weights.name)
    weights.write_bytes(content[:100])
    assert "not the weights of timm:test_efficientnet" in refusal(weights.name)
    weights.unlink()
    assert "no such file" in refusal(weights.name)
    path.write_text(text.replace('"image_size": 32', '"image_size": 64'))
    assert "not readable" in refusal(path.name)
    path.write_text(text.replace("triderm-tower", "triderm-other").replace("checksum", "other"))
    assert "not a triderm-tower file" in refusal(path.name)
    path.unlink()
    assert "no such file" in refusal(path.name)
    save_tower(tmp_path, record, tower)
    assert (path.read_text(), weights.read_bytes()) == (text, bytes(content))
    trained = TowerRecord.of(tower, config)
    save_tower(tmp_path, trained, tower)
    assert not (tmp_path / f"{trained.name}.safetensors").exists()
    with pytest.raises(CheckpointError, match="of a tower that trains"):
        load_tower(tmp_path, read_tower(tmp_path, trained.name))


def test_tower_is_found_by_its_settings(tmp_path: Path) -> None:
    assert find_tower(tmp_path, TowerConfig(), True) is None
    record, tower, config = frozen(tmp_path)
    frozen(tmp_path, image_size=64)
    trained = TowerRecord.of(tower, config)
    save_tower(tmp_path, trained, tower)
    assert find_tower(tmp_path, config, True) == record and find_tower(tmp_path, config, False) == trained
    for other in ({"pretrained": True}, {"image_size": None}):
        assert find_tower(tmp_path, config.model_copy(update=other), True) is None
    frozen(tmp_path)  # the same settings, and other random weights
    assert find_tower(tmp_path, config, True) is None


def test_frame_is_recorded_and_square_ones_keep_their_names(tmp_path: Path) -> None:
    record, tower, config = frozen(tmp_path)
    assert record.frame == "square" and "frame" not in record.settings
    squashed = TowerRecord.of(tower, config.model_copy(update={"frame": "squash"}), record.weights)
    save_tower(tmp_path, squashed, tower)
    assert squashed.name != record.name and read_tower(tmp_path, squashed.name).frame == "squash"


def test_source_of_a_plugin_is_rebuilt_by_its_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, options: TowerOptions) -> Tower:
        assert not options.pretrained
        blocks = [torch.nn.Conv2d(4, 4, 1) for _ in range(depth)]
        size = options.image_size or 64
        return Tower(
            torch.nn.Conv2d(3, 4, 32, stride=32), blocks, torch.nn.Identity(), width=4, num_tokens=(size // 32) ** 2,
            image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, layout="NCHW", architecture=f"{name} of depth {depth}",
        )  # fmt: skip

    depth = 2
    monkeypatch.setitem(TOWER_SOURCES, "own", TowerSource("own:NAME", build))
    record, tower, _ = frozen(tmp_path, source="own:net", image_size=32)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(tokens(load_tower(tmp_path, record), x), tokens(tower, x))
    depth = 3
    with pytest.raises(CheckpointError, match=r"own:net: the installed .* 'net of depth 3'.*of depth 2"):
        load_tower(tmp_path, record)
