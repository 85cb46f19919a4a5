"""Towers from timm, and the split of a timm model into stem, blocks and tail."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triderm_dist.models.hub import hub_page, is_cached, why_unreachable
from triderm_dist.models.tower import (
    InputSpec,
    Tower,
    TowerOptions,
    WeightsLocation,
    checked_size,
    refuse_quick_gelu,
)
from triderm_dist.models.weight_files import existing_weights, is_safetensors, read_weight_file, weight_file
from triderm_dist.models.weights import fill, rename_by_order, without_prefix
from triderm_dist.runtime.messages import listed, nearest, one_line
from triderm_dist.schema import InputError

HEADS = ("global_pool", "attn_pool", "fc_norm", "pre_logits", "head", "head_drop", "head_dist", "classifier", "fc")
"""Names of children of timm models that come after the features."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_CONTAINERS = re.compile(r"blocks|stages|layers|(layer|s)\d+")


def build_timm(name: str, options: TowerOptions) -> Tower:
    """Build MODEL with weights from timm's hub, or MODEL@FILE with those of a file (see `weight_file`)."""
    import timm

    refuse_quick_gelu(options, f"timm:{name}")
    model_name, _, file = name.partition("@")
    _check_name(model_name)
    download = options.pretrained and not file
    if download:
        _check_hub(model_name)
    try:
        model: Any = timm.create_model(model_name, pretrained=download, num_classes=0)
    except Exception as error:  # timm and the hub's client raise many types
        advice = "check the network, or give the weights as timm:NAME@FILE" if download else "choose another model"
        raise InputError(
            f"timm:{model_name}: cannot be built ({one_line(error, 160, with_type=True)}); {advice}"
        ) from None
    weights = "weights from timm's hub" if download else "random weights"
    if options.pretrained and file:
        weights = _fill(model, model_name, weight_file(file))
    settings = model.pretrained_cfg
    spec = InputSpec(settings["input_size"][-1], tuple(settings["mean"]), tuple(settings["std"]))
    return split_model(model, model_name, spec, options.image_size, f"timm:{model_name}: {weights}")


def locate_timm(name: str, pretrained: bool) -> WeightsLocation:
    """Find the weights of MODEL or MODEL@FILE."""
    import timm

    model_name, _, file = name.partition("@")
    _check_name(model_name)
    if not pretrained:
        return WeightsLocation("random weights", True)
    if file:
        return WeightsLocation(f"found {existing_weights(weight_file(file)).name}", True)
    settings = timm.get_pretrained_cfg(model_name)
    if settings is None or not (settings.hf_hub_id or settings.url or settings.file):
        raise InputError(
            f"timm:{model_name}: timm has no weights of this model; use timm:NAME@FILE or tower.pretrained=false"
        )
    cached = is_cached(settings.hf_hub_id, HUB_FILES) if settings.hf_hub_id else False
    return WeightsLocation(f"weights {'cached' if cached else 'not cached'}", cached)


def _check_hub(model_name: str) -> None:
    """Raise InputError if the weights are to be downloaded from the hub, and it cannot be reached."""
    import timm

    settings = timm.get_pretrained_cfg(model_name)
    repository = settings.hf_hub_id if settings else None
    if not repository or is_cached(repository, HUB_FILES):
        return
    if why := why_unreachable(repository, HUB_FILES[0]):
        raise InputError(
            f"timm:{model_name}: cannot download its weights ({why}); fetch {HUB_FILES[0]} of {hub_page(repository)} "
            f"on a machine with a network, and use timm:{model_name}@FILE"
        )


def _check_name(model_name: str) -> None:
    import timm

    if not timm.is_model(model_name):
        near = nearest(model_name.partition(".")[0], timm.list_models(), cutoff=0.0)
        raise InputError(
            f"timm:{model_name}: timm {timm.__version__} has no model {model_name!r}; did you mean {near!r}?"
        )


def _fill(model: nn.Module, name: str, file: Path) -> str:
    """Load a file into a timm model without classifier; returns a summary for the tower's report."""
    import timm

    state = read_weight_file(file)
    note = ""
    if not set(state) & set(model.state_dict()) and not is_safetensors(file):  # which keeps no order
        with torch.device("meta"):
            names = timm.create_model(name, pretrained=False).state_dict()
        renamed = rename_by_order(state, names)
        if renamed is not None:
            state, note = renamed, ", names differ, renamed by order since count, order and shapes all agree"
    heads = tuple(f"{head}." for head in HEADS)
    inner, prefix = without_prefix(state, model, file, heads)
    unused = [*fill(model, inner, file, heads), *(key for key in state if prefix and not key.startswith(prefix))]
    if prefix:
        note += f" under {prefix.rstrip('.')!r}"
    left_out = f", left out: {listed(unused)}" if unused else ""
    return f"{len(state) - len(unused)} tensors of {file}{note}{left_out}"


def split_model(model: Any, name: str, spec: InputSpec, image_size: int | None, report: str) -> Tower:
    """Split a timm model into stem, blocks and tail, with input size `image_size`; None keeps the model's.

    Checks on random pixels that the sequence of parts computes the model's features. Raises InputError if it does not.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    size = checked_size(image_size, spec.size, patch)
    if size != spec.size and hasattr(model, "set_input_size"):
        model.set_input_size((size, size))
        report += f"; positions resampled from {spec.size} to {size} pixels"
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    training = model.training
    model.eval()
    with torch.no_grad():
        features = model.forward_features(pixels)
    stem, blocks, tail = _take_apart(model)
    if not _computes(nn.Sequential(stem, *blocks, tail), pixels, features) or not blocks:
        raise InputError(
            f"timm:{name}: cannot be split into a sequential chain of blocks; "
            "supported: ViT, BEiT, EfficientNet, ResNet, ConvNeXt, Swin"
        )
    if features.ndim == 3:
        layout, prefix_tokens, width = "NLC", getattr(model, "num_prefix_tokens", 0), features.shape[2]
    else:
        layout, prefix_tokens = str(getattr(model, "output_fmt", "NCHW")).split(".")[-1], 0
        width = features.shape[-1] if layout == "NHWC" else features.shape[1]
    tower = Tower(
        stem,
        blocks,
        tail,
        width=width,
        num_tokens=features[0].numel() // width - prefix_tokens,
        image_size=size,
        mean=spec.mean,
        std=spec.std,
        layout=layout,
        prefix_tokens=prefix_tokens,
        architecture=name,
        report=report,
    )
    return tower.train(training)


class _Stem(nn.Module):
    """A timm model without its blocks, tail and head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def _take_apart(model: Any) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """Split a model, in place, into stem, blocks and tail (the modules between blocks and head)."""
    children = [child for child, _ in model.named_children()]
    containers = [child for child in children if _CONTAINERS.fullmatch(child)]
    blocks: list[nn.Module] = []
    for child in containers:
        container = model.get_submodule(child)
        # Each of ResNet's layers is a block; the only container of a ViT holds the blocks.
        blocks += [container] if len(containers) > 1 else list(container.children())
        setattr(model, child, nn.ModuleList() if isinstance(container, nn.ModuleList) else nn.Sequential())
    after = children[children.index(containers[-1]) + 1 :] if containers else []
    tail = [model.get_submodule(child) for child in takewhile(lambda child: child not in HEADS, after)]
    for child in after:
        setattr(model, child, nn.Identity())
    return _Stem(model), blocks, nn.Sequential(*tail)


def _computes(chain: nn.Module, pixels: Tensor, features: Tensor) -> bool:
    try:
        with torch.no_grad():
            return torch.allclose(chain(pixels), features, rtol=1e-4, atol=1e-5)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # a block needs more inputs than the previous output
        return False
