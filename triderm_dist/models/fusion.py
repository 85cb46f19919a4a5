"""Fusion of the dermoscopic view with the clinical one and with concepts, by cross-attention (TMCT-inspired).

Three stages: view alignment, semantic gating, global pooling. The first two are pre-norm,
    y = x + Attention(norm(x), norm'(context)),    z = y + MLP(norm''(y)),
with a separate norm for each modality. The idea is from SkinM2Former (2024), which fuses at several encoder levels;
this network fuses once, after the encoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.models.concepts import learned_token
from triderm_dist.models.dropout import LesionVectorDropout

STAGES = ("view_alignment", "semantic_gating")
"""The stages of a fusion block, in order."""


class CrossAttention(nn.Module):
    """Attend from queries (B, Q, D) to a context (B, L, D): softmax(q k' / sqrt(D / heads)) v, then a linear map.

    Dropout hides a context token from a head, for all queries of a lesion. It is dropout of attention weights with one
    mask for all queries, which is compatible with fused attention kernels.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, LesionVectorDropout(dropout)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        q, k, v = (self._split(linear) for linear in (self.query(query), self.key(context), self.value(context)))
        attended = _attend(q, k, self.dropout(v))
        return self.out(attended.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, context: Tensor) -> Tensor:
        """Return the attention weights, averaged over heads, (B, Q, L); `forward` does not compute them."""
        q, k = self._split(self.query(query)), self._split(self.key(context))
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1).mean(1)

    def _split(self, tokens: Tensor) -> Tensor:
        """Reshape (B, L, D) to (B, heads, L, D / heads)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt(d)) v, of (B, heads, L, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # PyTorch's kernel takes two to six times as long, mostly in the backward pass (torch 2.14).
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class _Stage(nn.Module):
    """Update x (B, Q, D) by attention to a context (B, L, D) of another modality, then by an MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.query_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attention(self.query_norm(x), self.context_norm(context))
        return x + self.mlp(self.mlp_norm(x))

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the attention weights of each token of x over the context, (B, Q, L)."""
        return self.attention.weights(self.query_norm(x), self.context_norm(context))


class ViewAlignment(_Stage):
    """Dermoscopic tokens attend to clinical tokens."""


class SemanticGating(_Stage):
    """Aligned image tokens attend to concept, metadata and null tokens."""


class FusionBlock(nn.Module):
    """Apply view alignment, then semantic gating: x and clinical (B, L, D), semantic (B, S, D) to (B, L, D).

    x: tokens of the dermoscopic view, or of a task's only one.  stages: those that the block has; the context of the
    other one is ignored.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, dropout: float, stages: Sequence[str] = STAGES
    ) -> None:
        super().__init__()
        if "view_alignment" in stages:
            self.view_alignment = ViewAlignment(width, heads, mlp_ratio, dropout)
        if "semantic_gating" in stages:
            self.semantic_gating = SemanticGating(width, heads, mlp_ratio, dropout)

    def forward(self, x: Tensor, clinical: Tensor | None, semantic: Tensor | None) -> Tensor:
        for _, stage, context in self.stages(clinical, semantic):
            x = stage(x, context)
        return x

    def stages(self, clinical: Tensor | None, semantic: Tensor | None) -> list[tuple[str, _Stage, Any]]:
        """Return the block's stages in order: name, module, and the tokens that it attends to."""
        contexts = zip(STAGES, (clinical, semantic), strict=True)
        return [(name, getattr(self, name), context) for name, context in contexts if hasattr(self, name)]


class GlobalPooling(nn.Module):
    """Pool tokens (B, L, D) by attention of a learned query to (B, D): norm(Attention(query, x))."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query = learned_token(1, 1, width)
        self.attention = CrossAttention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(self.query.expand(x.shape[0], -1, -1), x)).squeeze(1)

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights of the query, (B, L)."""
        return self.attention.weights(self.query.expand(x.shape[0], -1, -1), x).squeeze(1)
