"""Visual towers of open_clip checkpoints: its own ViT, a timm model, or PanDerm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triderm_dist.models.hub import hub_file, is_cached
from triderm_dist.models.panderm import build_panderm, is_panderm, load_panderm, rebuild_panderm, split_panderm
from triderm_dist.models.timm_tower import HEADS, split_model
from triderm_dist.models.tower import (
    OPENAI_MEAN,
    OPENAI_STD,
    InputSpec,
    Tower,
    TowerOptions,
    Triple,
    WeightsLocation,
    checked_size,
    refuse_quick_gelu,
)
from triderm_dist.models.weight_files import (
    existing_file,
    existing_weights,
    read_weight_file,
    weights_in,
)
from triderm_dist.models.weights import fill, strip_prefix
from triderm_dist.runtime.messages import listed, one_line
from triderm_dist.schema import CheckpointError, InputError

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def build_from_hub(name: str, options: TowerOptions) -> Tower:
    """Build the visual tower of the open_clip repository OWNER/NAME on the Hugging Face hub."""
    config = hub_file(name, (CONFIG_FILE,))
    return _build(f"hf-hub:{name}", config, lambda: hub_file(name, WEIGHT_FILES), options)


def locate_on_hub(name: str, pretrained: bool) -> WeightsLocation:
    """Look OWNER/NAME up in the local cache."""
    cached = is_cached(name, (CONFIG_FILE,)) and (not pretrained or is_cached(name, WEIGHT_FILES))
    return WeightsLocation("cached" if cached else "not cached", cached)


def build_from_folder(name: str, options: TowerOptions) -> Tower:
    """Build the visual tower of a folder with open_clip's config and weights."""
    folder = Path(name)
    return _build(f"local-dir:{name}", folder / CONFIG_FILE, lambda: weights_in(folder, WEIGHT_FILES), options)


def locate_in_folder(name: str, pretrained: bool) -> WeightsLocation:
    """Find config and weights in a folder."""
    existing_file(Path(name) / CONFIG_FILE)
    if pretrained:
        existing_weights(weights_in(Path(name), WEIGHT_FILES))
    return WeightsLocation("found", True)


def _build(source: str, config: Path, find_weights: Callable[[], Path], options: TowerOptions) -> Tower:
    model_cfg, preprocess = _read_config(source, config)
    vision = model_cfg["vision_cfg"]
    mean = tuple(preprocess.get("mean") or OPENAI_MEAN)
    std = tuple(preprocess.get("std") or OPENAI_STD)
    file = find_weights() if options.pretrained else config
    state = read_weight_file(file) if options.pretrained else {}
    if "pretrain_path" in vision or is_panderm(state):
        refuse_quick_gelu(options, source)
        if options.pretrained:
            model, weights = load_panderm(state, file)
        else:
            defaults = {"width": 768, "layers": 12, "patch_size": 16, "image_size": 224}
            model = build_panderm(*(vision.get(key, default) for key, default in defaults.items()))
            weights = "random weights"
        spec = InputSpec(model.patch_embed.img_size[0], mean, std)
        report = f"{source}: PanDerm in an open_clip checkpoint, {weights}"
        return split_panderm(model, spec, options.image_size, report)

    quick_gelu = bool(model_cfg.get("quick_gelu", False)) if options.quick_gelu is None else options.quick_gelu
    visual = _build_visual(model_cfg, quick_gelu, config)
    weights = _fill(visual, state, file) if options.pretrained else "random weights"
    if hasattr(visual, "trunk"):
        refuse_quick_gelu(options, source)
        report = f"{source}: open_clip around timm {vision['timm_model_name']}, {weights}"
        return _split(visual, model_cfg, quick_gelu, mean, std, options.image_size, report)
    if options.quick_gelu is not None:
        origin = "by setting"
    elif "quick_gelu" in model_cfg:
        origin = "by the config"
    else:
        origin = "not in the config; towers trained from OpenAI's weights need tower.quick_gelu=true"
    report = f"{source}: open_clip ViT, {weights}; QuickGELU {'on' if quick_gelu else 'off'} ({origin})"
    return _split(visual, model_cfg, quick_gelu, mean, std, options.image_size, report)


def rebuild_open_clip(description: Mapping[str, Any], image_size: int) -> Tower:
    """Build a tower with random weights from the description of one of an open_clip repository or folder."""
    if "panderm" in description:
        return rebuild_panderm(description, image_size)
    model_cfg, quick_gelu = description["model_cfg"], description["quick_gelu"]
    visual = _build_visual(model_cfg, quick_gelu, "the recorded open_clip config")
    return _split(visual, model_cfg, quick_gelu, OPENAI_MEAN, OPENAI_STD, image_size, "open_clip, random weights")


def _split(
    visual: Any,
    model_cfg: Mapping[str, Any],
    quick_gelu: bool,
    mean: Triple,
    std: Triple,
    image_size: int | None,
    report: str,
) -> Tower:
    """Convert a visual tower of open_clip, a timm model or a ViT, to a `Tower`."""
    if hasattr(visual, "trunk"):
        spec = InputSpec(visual.trunk.pretrained_cfg["input_size"][-1], mean, std)
        tower = split_model(visual.trunk, model_cfg["vision_cfg"]["timm_model_name"], spec, image_size, report)
    else:
        spec = InputSpec(visual.image_size[0], mean, std)
        architecture = f"open_clip ViT, QuickGELU {'on' if quick_gelu else 'off'}"
        tower = _split_vit(visual, spec, image_size, architecture, report)
    vision_only = {key: model_cfg[key] for key in ("embed_dim", "vision_cfg") if key in model_cfg}
    tower.description = {"model_cfg": vision_only, "quick_gelu": quick_gelu}
    return tower


def _read_config(source: str, config: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model_cfg and preprocess_cfg of an open_clip_config.json."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        model_cfg = settings.get("model_cfg", settings)
        model_cfg["vision_cfg"].get("width")
        preprocess = settings.get("preprocess_cfg") or {}
        for name in ("mean", "std"):
            if len(each := preprocess.get(name) or (0.5,) * 3) != 3 or not all(math.isfinite(value) for value in each):
                raise ValueError(f"preprocess_cfg.{name} holds {each!r:.40}, not three numbers")
        return model_cfg, preprocess
    except FileNotFoundError:
        raise InputError(f"{config}: no such file; {source} must name a folder with {CONFIG_FILE}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{config}: not an open_clip config ({one_line(error, with_type=True)})") from None


def _build_visual(model_cfg: Mapping[str, Any], quick_gelu: bool, config: Path | str) -> Any:
    """Build only open_clip's visual tower; its public builders also build the text tower, which may access the hub."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    try:
        vision = CLIPVisionCfg(**model_cfg["vision_cfg"])
        vision.timm_model_pretrained = False
        visual = _build_vision_tower(model_cfg.get("embed_dim", 512), vision, quick_gelu)
    except Exception as error:  # open_clip, timm and PyTorch raise many types for sizes that do not match
        raise InputError(f"{config}: open_clip cannot build this vision tower ({one_line(error, 160)})") from None
    if not hasattr(visual, "trunk") and (not hasattr(visual, "transformer") or visual.attn_pool is not None):
        raise InputError(
            f"{config}: only open_clip's ViT without attentional pooling and its timm models are supported"
        )
    return visual


def _fill(visual: Any, state: dict[str, Tensor], file: Path) -> str:
    """Load the tensors under `visual.`; returns a summary for the tower's report."""
    is_timm = hasattr(visual, "trunk")
    visual_state = strip_prefix(state, "visual.trunk." if is_timm else "visual.")
    if not visual_state:
        raise CheckpointError(f"{file}: has no 'visual.' tensors; its first keys are {listed(list(state))}")
    optional = tuple(f"{head}." for head in HEADS) if is_timm else ("proj",)
    unused = fill(visual.trunk if is_timm else visual, visual_state, file, optional)
    return f"{len(visual_state) - len(unused)} tensors of {file.name}; left out: text tower, projection"


class _VitStem(nn.Module):
    """Patch embedding, class token, positions and first norm of open_clip's ViT: pixels to (B, 1 + L, width)."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1).to(patches.dtype)
        return self.ln_pre(torch.cat([class_token, patches], 1) + self.positional_embedding.to(patches.dtype))


def _split_vit(visual: Any, spec: InputSpec, image_size: int | None, architecture: str, report: str) -> Tower:
    from timm.layers import resample_abs_pos_embed

    patch = visual.patch_size[0]
    size = checked_size(image_size, spec.size, patch)
    stem = _VitStem(visual)
    if size != spec.size:
        positions = stem.positional_embedding
        resampled = resample_abs_pos_embed(positions.detach()[None], [size // patch] * 2, num_prefix_tokens=1)[0]
        stem.positional_embedding = nn.Parameter(resampled, requires_grad=positions.requires_grad)
        report += f"; positions resampled from {spec.size} to {size} pixels"
    return Tower(
        stem,
        list(visual.transformer.resblocks),
        visual.ln_post,
        width=visual.conv1.out_channels,
        num_tokens=(size // patch) ** 2,
        image_size=size,
        mean=spec.mean,
        std=spec.std,
        prefix_tokens=1,
        architecture=architecture,
        report=report,
    )
