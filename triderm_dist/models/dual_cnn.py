"""The dual CNN: each view pooled by itself, late fusion with concepts and metadata in an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.concepts import MAX_AGE
from triderm_dist.models.network import Head, Network, ViewTokens
from triderm_dist.models.towers import TokenShape, Tower
from triderm_dist.schema import METADATA_CATEGORIES, METADATA_FIELDS, VIEWS, Outputs


class DualCnn(Network):
    """See `Network` for inputs. A view's tokens are averaged, as in a CNN's global pooling, or one learned vector."""

    def __init__(self, config: ModelConfig, concepts: Sequence[str], towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__(config, concepts, towers)
        width, dropout = config.width, config.dropout
        pooled = TokenShape(1, self.token_shape.width)
        self.views = nn.ModuleDict({view: ViewTokens(pooled, width, view in self.used_views) for view in VIEWS})
        self.view_norms = nn.ModuleDict({view: nn.LayerNorm(width) for view in VIEWS})
        self.tabular = TabularFeatures(len(concepts) if "concepts" in config.use else 0, "metadata" in config.use)
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
    """Concepts (B, K) and metadata (B, M) to (B, width): values (missing: 0), one-hot categories, missing flags."""

    def __init__(self, concepts: int, metadata: bool) -> None:
        super().__init__()
        self.concepts, self.metadata = concepts, metadata
        one_hot = sum(len(names) + 1 for names in METADATA_CATEGORIES.values())
        self.width = 2 * concepts + (2 + one_hot if metadata else 0)

    def forward(self, concepts: Tensor, metadata: Tensor) -> Tensor:
        parts = []
        if self.concepts:
            parts += [concepts.nan_to_num(nan=0.0), concepts.isnan().float()]
        if self.metadata:
            columns = dict(zip(METADATA_FIELDS, metadata.unbind(1), strict=True))
            age = columns["age"][:, None]
            parts += [age.nan_to_num(nan=0.0) / MAX_AGE, age.isnan().float()]
            for field, names in METADATA_CATEGORIES.items():
                index = columns[field].nan_to_num(nan=len(names)).long()  # the last column is the missing flag
                parts.append(F.one_hot(index, len(names) + 1).float())
        return torch.cat(parts, 1).float()
