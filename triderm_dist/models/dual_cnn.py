"""The dual CNN: separate pooling of each view, then late fusion with concepts and metadata by an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.network import Head, Network, ViewTokens
from triderm_dist.models.tower import TokenShape, Tower
from triderm_dist.schema import MetadataField, Outputs, Signature


class DualCnn(Network):
    """Average each view's tokens, as in a CNN's global pooling, and classify the means, concepts and metadata.

    See `Network` for the inputs. A missing view is one learned vector.
    """

    reads_mean_tokens = True
    compiled_methods = ("fuse",)

    def __init__(self, config: ModelConfig, signature: Signature, towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__(config, signature, towers)
        width, dropout, classes = config.width, config.dropout, len(signature.diagnoses)
        pooled = TokenShape(1, self.token_shape.width)
        self.views = nn.ModuleDict(
            {view: ViewTokens(pooled, width, view in self.used_views) for view in signature.views}
        )
        self.view_norms = nn.ModuleDict({view: nn.LayerNorm(width) for view in signature.views})
        self.tabular = TabularFeatures(len(self.used_concepts), self.used_fields)
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
        parts = len(signature.views) + (self.table is not None)
        self.fusion = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(parts * width, width), nn.GELU(), nn.LayerNorm(width)
        )
        self.head = Head(width, classes, config.head, dropout)
        self.aux_heads = nn.ModuleDict({view: Head(width, classes, config.head, dropout) for view in signature.views})

    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        pooled = {view: value.mean(1, keepdim=True) for view, value in tokens.items()}
        views = {
            view: self.view_norms[view](self.views[view](pooled.get(view), present[view]).squeeze(1))
            for view in self.signature.views
        }
        parts = list(views.values())
        if self.table is not None:
            parts.append(self.table(self.tabular(concepts, metadata).to(parts[0].dtype)))
        features = self.fusion(torch.cat(parts, 1)).float()
        aux = {view: self.aux_heads[view](views[view]) for view in views}
        return Outputs(self.head(features), aux.get("clinical"), aux.get("dermoscopic"), features)

    def parameter_meanings(self) -> dict[str, Any]:
        diagnoses, inputs = self.signature.diagnoses, (self.signature.views, self.table is not None)
        table = (self.used_concepts, [each.meaning() for each in self.used_fields])
        return {"head": diagnoses, "aux_heads": diagnoses, "table": table, "fusion": inputs}

    def fusion_stages(self) -> list[nn.Module]:
        return []


class TabularFeatures(nn.Module):
    """Encode concept scores (B, K) and metadata (B, M) as one vector per lesion, (B, width).

    A number becomes its value (0 where missing) and a missing flag, a category a one-hot vector whose last element is
    the missing flag. concepts: K, or 0 to ignore the scores.  fields: the M metadata fields, or () to ignore them.
    """

    def __init__(self, concepts: int, fields: Sequence[MetadataField]) -> None:
        super().__init__()
        self.concepts, self.fields = concepts, tuple(fields)
        self.width = 2 * concepts + sum(2 if field.is_number else len(field.categories) + 1 for field in self.fields)

    @property
    def flag_of(self) -> list[int]:
        """For each column the index of its missing flag; a flag's index is its own."""
        columns = [self.concepts + number for number in range(self.concepts)] * 2
        for field in self.fields:
            size = 2 if field.is_number else len(field.categories) + 1
            columns += [len(columns) + size - 1] * size
        return columns

    def forward(self, concepts: Tensor, metadata: Tensor) -> Tensor:
        parts = []
        if self.concepts:
            parts += [concepts.nan_to_num(nan=0.0), concepts.isnan().float()]
        for field, values in zip(self.fields, metadata.unbind(1) if self.fields else (), strict=True):
            if field.is_number:
                parts += [field.scaled(values).nan_to_num(nan=0.0)[:, None], values.isnan().float()[:, None]]
            else:
                missing = len(field.categories)
                parts.append(F.one_hot(values.nan_to_num(nan=missing).long(), missing + 1).float())
        return torch.cat(parts, 1).float()
