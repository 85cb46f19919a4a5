"""PanDerm's image tower, read from any of its published layouts into timm's `Beit`, which computes the same.

A pre-norm ViT with layer scale, query and value bias but no key bias, no relative positions, and fixed sine-cosine
positions that travel in the state dict. Architecture: Yan et al., "A multimodal vision foundation model for clinical
dermatology", 2025 (CAE v2 pre-training). Upstream loads with `strict=False`, so that a wrong prefix silently gives a
random encoder; here the file fills the tower or is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from triderm_dist.models.weights import State, fill, listing, strip_prefix
from triderm_dist.schema import CheckpointError

PREFIXES = ("", "visual.", "encoder.")
"""Where the tower sits: PanDerm base, PanDerm base inside DermLIP, PanDerm large."""

HEAD_WIDTH = 64


def is_panderm(state: Mapping[str, Tensor]) -> bool:
    """Whether a tower of this kind sits under one of `PREFIXES`."""
    return any(_sits_under(state, prefix) for prefix in PREFIXES)


def build_panderm(width: int, depth: int, patch_size: int, image_size: int, mlp_ratio: float = 4.0) -> Any:
    """A tower with random weights. Head width is 64 in all of them."""
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
    """The tower that `state` holds, sizes read from its tensors, and a line that says what was taken and left out.

    With `pretrained=False` only the sizes are taken. Raises CheckpointError naming the file and its first keys.
    """
    for prefix in PREFIXES:
        if _sits_under(state, prefix):
            break
    else:
        raise CheckpointError(
            f"{file}: no PanDerm tower under '', 'visual.' or 'encoder.': cls_token, pos_embed, "
            f"patch_embed.proj.weight, blocks.0.attn.q_bias are missing; the file has {listing(list(state))}"
        )
    tower_state = strip_prefix(state, prefix)
    model = build_panderm(**_sizes(tower_state, file))  # type: ignore[arg-type]
    if not pretrained:
        return model, "random weights"
    # Under an empty prefix other networks of the same file (decoder, teacher, regressor, text) lie beside the tower.
    rest = fill(model, tower_state, file, left_out=("head.", "fc_norm."))
    # The positions are a fixed table upstream; timm makes them a trainable parameter.
    model.pos_embed.requires_grad_(False)
    beside = sorted({key.split(".")[0] for key in (*rest, *(key for key in state if not key.startswith(prefix)))})
    under = f" under {prefix!r}" if prefix else ""
    return model, f"{len(tower_state) - len(rest)} tensors{under}" + (
        f", left out: {', '.join(beside)}" if beside else ""
    )


def _sits_under(state: Mapping[str, Tensor], prefix: str) -> bool:
    wanted = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.q_bias")
    return all(prefix + key in state for key in wanted)


def _sizes(state: State, file: Path) -> dict[str, float]:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    patches = state["pos_embed"].shape[1] - 1
    if width % HEAD_WIDTH or isqrt(patches) ** 2 != patches:
        raise CheckpointError(
            f"{file}: width {width} with {patches} patches is no PanDerm tower (heads are {HEAD_WIDTH} wide)"
        )
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * width
    return {
        "width": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "patch_size": patch,
        "image_size": isqrt(patches) * patch,
        "mlp_ratio": hidden / width,
    }
