"""Fusion of the dermoscopic view with the clinical one and with concepts, by cross-attention (TMCT-inspired).

The three stages of the build guide: view alignment, semantic gating, global pooling. A stage is pre-norm,
    y = x + Attention(norm(x), norm'(context)),    z = y + MLP(norm''(y)),
with a norm of its own for each modality. The idea is SkinM2Former's (2024), which fuses inside the encoder; here it is
done once, after the encoders.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.models.concepts import learned_token


class CrossAttention(nn.Module):
    """Queries (B, Q, D) attend to a context (B, L, D): softmax(q k' / sqrt(D / heads)) v, then a linear map."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens in (self.query(query), self.key(context), self.value(context))
        )
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2))


class _Stage(nn.Module):
    """x (B, Q, D) and a context (B, L, D) of another modality to (B, Q, D)."""

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


class ViewAlignment(_Stage):
    """Dermoscopic tokens attend to clinical tokens."""


class SemanticGating(_Stage):
    """Aligned image tokens attend to concept, metadata and null tokens."""


class FusionBlock(nn.Module):
    """View alignment, then semantic gating: dermoscopic and clinical (B, L, D), semantic (B, S, D) to (B, L, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.view_alignment = ViewAlignment(width, heads, mlp_ratio, dropout)
        self.semantic_gating = SemanticGating(width, heads, mlp_ratio, dropout)

    def forward(self, dermoscopic: Tensor, clinical: Tensor, semantic: Tensor) -> Tensor:
        return self.semantic_gating(self.view_alignment(dermoscopic, clinical), semantic)


class GlobalPooling(nn.Module):
    """A learned query attends to all tokens: norm(Attention(query, x)), (B, L, D) to (B, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query = learned_token(1, 1, width)
        self.attention = CrossAttention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(self.query.expand(len(x), -1, -1), x)).squeeze(1)
