"""The dual CNN: each view pooled by itself, late fusion with concepts and metadata in an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.network import Head, Network, ViewTokens
from triderm_dist.models.towers import TokenShape, Tower
from triderm_dist.schema import VIEWS, MetadataField, Outputs


class DualCnn(Network):
    """See `Network` for inputs. A view's tokens are averaged, as in a CNN's global pooling, or one learned vector."""

    def __init__(self, config: ModelConfig, concepts: Sequence[str], towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__(config, concepts, towers)
        width, dropout = config.width, config.dropout
        pooled = TokenShape(1, self.token_shape.width)
        self.views = nn.ModuleDict({view: ViewTokens(pooled, width, view in self.used_views) for view in VIEWS})
        self.view_norms = nn.ModuleDict({view: nn.LayerNorm(width) for view in VIEWS})
        self.tabular = TabularFeatures(
            len(concepts) if "concepts" in config.use else 0, self.fields if "metadata" in config.use else ()
        )
        self.table = (
            nn.Sequential(
                nn.Linear(self.tabular.width, width),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(width, width),
                nn.LayerNorm(width),
            )
            if self.tabular.width
            else None
        )
        parts = len(VIEWS) + (self.table is not None)
        self.fusion = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(parts * width, width), nn.GELU(), nn.LayerNorm(width)
        )
        self.head = Head(width, config.head, dropout)
        self.aux_heads = nn.ModuleDict({view: Head(width, config.head, dropout) for view in VIEWS})

    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        pooled = {view: value.mean(1, keepdim=True) for view, value in tokens.items()}
        views = {
            view: self.view_norms[view](self.views[view](pooled.get(view), present[view]).squeeze(1)) for view in VIEWS
        }
        parts = list(views.values())
        if self.table is not None:
            parts.append(self.table(self.tabular(concepts, metadata).to(parts[0].dtype)))
        features = self.fusion(torch.cat(parts, 1)).float()
        aux = {view: self.aux_heads[view](views[view]) for view in VIEWS}
        return Outputs(self.head(features), aux["clinical"], aux["dermoscopic"], features)

    def fusion_stages(self) -> list[nn.Module]:
        return []


class TabularFeatures(nn.Module):
    """Concepts (B, K) and metadata (B, M) to (B, width): numbers (missing: 0) and missing flags, one-hot categories.

    concepts: K, or 0 to ignore them.  fields: the M metadata fields, or none to ignore them.
    """

    def __init__(self, concepts: int, fields: Sequence[MetadataField]) -> None:
        super().__init__()
        self.concepts, self.fields = concepts, tuple(fields)
        self.width = 2 * concepts + sum(2 if field.is_number else len(field.categories) + 1 for field in self.fields)

    def forward(self, concepts: Tensor, metadata: Tensor) -> Tensor:
        parts = []
        if self.concepts:
            parts += [concepts.nan_to_num(nan=0.0), concepts.isnan().float()]
        for field, values in zip(self.fields, metadata.unbind(1) if self.fields else (), strict=True):
            if field.is_number:
                parts += [field.scaled(values).nan_to_num(nan=0.0)[:, None], values.isnan().float()[:, None]]
            else:
                missing = len(field.categories)  # the last column is the missing flag
                parts.append(F.one_hot(values.nan_to_num(nan=missing).long(), missing + 1).float())
        return torch.cat(parts, 1).float()
