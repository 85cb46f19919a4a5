"""PanDerm's image tower, read from any of its published layouts into timm's `Beit`, which computes the same function.

A pre-norm ViT with layer scale, query and value bias but no key bias, no relative positions, and fixed sine-cosine
positions that are part of the state dict. Architecture: Yan et al., "A multimodal vision foundation model for clinical
dermatology", 2025 (CAE v2 pre-training). Upstream loads with `strict=False`, so that a wrong prefix silently gives a
random encoder; `load_panderm` refuses a file that does not fill the tower completely.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from triderm_dist.models.timm_tower import split_model
from triderm_dist.models.tower import IMAGENET_MEAN, IMAGENET_STD, InputSpec, Tower
from triderm_dist.models.weights import State, fill, strip_prefix
from triderm_dist.runtime.messages import listed
from triderm_dist.schema import CheckpointError

PREFIXES = ("", "visual.", "encoder.")
"""Prefix of the tower's keys in PanDerm base, PanDerm base inside DermLIP, PanDerm large."""

HEAD_WIDTH = 64
"""Width of an attention head in every size."""


def is_panderm(state: Mapping[str, Tensor]) -> bool:
    """Return whether `state` holds a PanDerm tower under one of `PREFIXES`."""
    return any(_has_tower(state, prefix) for prefix in PREFIXES)


def build_panderm(width: int, depth: int, patch_size: int, image_size: int, mlp_ratio: float = 4.0) -> Any:
    """Build a tower with random weights."""
    from timm.models.beit import Beit

    return Beit(
        img_size=image_size,
        patch_size=patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=width,
        depth=depth,
        num_heads=width // HEAD_WIDTH,
        mlp_ratio=mlp_ratio,
        qkv_bias=True,
        init_values=0.1,
        use_abs_pos_emb=True,
        use_rel_pos_bias=False,
    )


def load_panderm(state: Mapping[str, Tensor], file: Path, pretrained: bool = True) -> tuple[Any, str]:
    """Build the tower in `state`, with sizes read from its tensors; returns it and a one-line report of the loading.

    pretrained False: only the sizes are taken. Raises CheckpointError with the file and its first keys.
    """
    prefix = next((prefix for prefix in PREFIXES if _has_tower(state, prefix)), None)
    if prefix is None:
        raise CheckpointError(
            f"{file}: no PanDerm tower under '', 'visual.' or 'encoder.': cls_token, pos_embed, "
            f"patch_embed.proj.weight, blocks.0.attn.q_bias are missing; the file has {listed(list(state))}"
        )
    tower_state = strip_prefix(state, prefix)
    model = build_panderm(**_sizes(tower_state, file))  # type: ignore[arg-type]
    if not pretrained:
        return model, "random weights"
    # Under an empty prefix the file's other networks (decoder, teacher, regressor, text) are in `tower_state` too.
    unused = fill(model, tower_state, file, optional=("head.", "fc_norm."))
    # The positions are a fixed table upstream; timm makes them a trainable parameter.
    model.pos_embed.requires_grad_(False)
    other = sorted({key.split(".")[0] for key in (*unused, *(key for key in state if not key.startswith(prefix)))})
    under = f" under {prefix!r}" if prefix else ""
    left_out = f", left out: {', '.join(other)}" if other else ""
    return model, f"{len(tower_state) - len(unused)} tensors{under}{left_out}"


def split_panderm(model: Any, spec: InputSpec, image_size: int | None, report: str) -> Tower:
    """Convert a model to a `Tower` with input size `image_size`; None keeps the model's."""
    description = {
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "patch_size": model.patch_embed.patch_size[0],
        "image_size": model.patch_embed.img_size[0],
        "mlp_ratio": model.blocks[0].mlp.fc1.out_features / model.embed_dim,
    }
    tower = split_model(model, "PanDerm", spec, image_size, report)
    tower.description = {"panderm": description}
    return tower


def rebuild_panderm(description: Mapping[str, Any], image_size: int) -> Tower:
    """Build a tower with random weights from the description of one that `split_panderm` made."""
    model = build_panderm(**description["panderm"])
    spec = InputSpec(model.patch_embed.img_size[0], IMAGENET_MEAN, IMAGENET_STD)
    return split_panderm(model, spec, image_size, "PanDerm, random weights")


def _has_tower(state: Mapping[str, Tensor], prefix: str) -> bool:
    keys = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.q_bias")
    return all(prefix + key in state for key in keys)


def _sizes(state: State, file: Path) -> dict[str, float]:
    """Return the arguments of `build_panderm`, from the shapes of the tensors."""
    for key, axes in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
        if key in state and (state[key].ndim != axes or not state[key].numel()):
            raise CheckpointError(f"{file}: not a PanDerm tower: {key} has shape {tuple(state[key].shape)}")
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if gaps := {str(number) for number in range(len(blocks))} ^ blocks:
        raise CheckpointError(f"{file}: not a PanDerm tower: its blocks do not count from 0, at {min(gaps)!r:.40}")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    patches = state["pos_embed"].shape[1] - 1
    if width % HEAD_WIDTH or isqrt(patches) ** 2 != patches:
        raise CheckpointError(
            f"{file}: not a PanDerm tower: width {width} must be a multiple of {HEAD_WIDTH}, {patches} patches a square"
        )
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * width
    return {
        "width": width,
        "depth": len(blocks),
        "patch_size": patch,
        "image_size": isqrt(patches) * patch,
        "mlp_ratio": hidden / width,
    }
