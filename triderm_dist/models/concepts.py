"""Concept scores and metadata as tokens that image tokens attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triderm_dist.models.attention import NULL
from triderm_dist.schema import MetadataField

NUM_BUMPS = 8
TOKEN_STD = 0.02
"""Initial standard deviation of learned tokens, as in ViT and BERT."""


def smooth_features(x: Tensor) -> Tensor:
    """Expand x (...) into itself and Gaussian bumps over [0, 1], (..., 1 + NUM_BUMPS).

    A linear map of these features is a smooth function of x.
    """
    centers = torch.linspace(0, 1, NUM_BUMPS, device=x.device)
    bumps = torch.exp(-0.5 * ((x[..., None] - centers) * (NUM_BUMPS - 1)) ** 2)
    return torch.cat([x[..., None], bumps], -1)


def learned_token(*shape: int) -> nn.Parameter:
    """Create a learned vector or table of vectors."""
    return nn.Parameter(torch.randn(*shape) * TOKEN_STD)


class NumericTokens(nn.Module):
    """Embed n numbers of about [0, 1], NaN where missing, (B, n) to tokens (B, n, D).

    token = name + curve(value), or name + missing. The value is added to the token, since softmax and norms would
    remove a value that only scaled the attention or the token.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.name = learned_token(n, width)
        self.missing = learned_token(n, width)
        self.curve = learned_token(n, 1 + NUM_BUMPS, width)

    def forward(self, values: Tensor) -> Tensor:
        missing = values.isnan()
        features = smooth_features(values.float().masked_fill(missing, 0.0)).to(self.curve.dtype)
        # Not einsum: for n = 1 its gradient has other strides than the parameter, and DDP warns on every rank.
        value = torch.bmm(features.transpose(0, 1), self.curve).transpose(0, 1)
        return self.name + torch.where(missing[..., None], self.missing, value)


class CategoryToken(nn.Module):
    """Embed the index of a category, NaN where missing, (B,) to a token (B, 1, D). Missing is an extra category."""

    def __init__(self, categories: int, width: int) -> None:
        super().__init__()
        self.categories = categories
        self.embedding = nn.Embedding(categories + 1, width)
        nn.init.normal_(self.embedding.weight, std=TOKEN_STD)

    def forward(self, index: Tensor) -> Tensor:
        return self.embedding(index.nan_to_num(nan=self.categories).long())[:, None]


class SemanticTokens(nn.Module):
    """Embed concept scores (B, K) and metadata (B, M) as tokens (B, K + M + 1, D), in the order of `names`.

    concepts, fields: names of the K scores and the M fields, or () to ignore the scores or the metadata; K or M is then
    0. The last token is `NULL`.
    """

    def __init__(self, concepts: Sequence[str], fields: Sequence[MetadataField], width: int) -> None:
        super().__init__()
        self.fields = tuple(fields)
        self.concepts = NumericTokens(len(concepts), width) if concepts else None
        # Checkpoints hold these names: `age.curve` of a number, `categories.sex.embedding` of a category.
        for field in self.fields:
            if field.is_number:
                self.add_module(_module_name(self, field), NumericTokens(1, width))
        self.categories = nn.ModuleDict()
        for field in self.fields:
            if not field.is_number:
                self.categories[_module_name(self.categories, field)] = CategoryToken(len(field.categories), width)
        self.null = learned_token(1, width)
        self.names: tuple[str, ...] = (*concepts, *(field.name for field in self.fields), NULL)

    @property
    def meanings(self) -> dict[str, Any]:
        """Meanings of parameters, by prefix; see `Network.parameter_meanings`."""
        meanings: dict[str, Any] = {"concepts": list(self.names[: -1 - len(self.fields)])}
        for field in self.fields:
            parent, prefix = (self, "") if field.is_number else (self.categories, "categories.")
            meanings[prefix + _module_name(parent, field)] = field.meaning()
        return meanings

    def forward(self, concepts: Tensor, metadata: Tensor) -> Tensor:
        tokens = [] if self.concepts is None else [self.concepts(concepts)]
        for field, values in zip(self.fields, metadata.unbind(1) if self.fields else (), strict=True):
            if field.is_number:
                tokens.append(getattr(self, _module_name(self, field))(field.scaled(values)[:, None]))
            else:
                tokens.append(self.categories[_module_name(self.categories, field)](values))
        return torch.cat([*tokens, self.null.expand(concepts.shape[0], -1, -1)], 1)


def _module_name(parent: nn.Module, field: MetadataField) -> str:
    """Name a field's module in `parent`: as the field, with an underscore if an attribute of `parent` has this name."""
    own = {"concepts", "fields", "categories", "null", "names", "training"}
    return f"{field.name}_" if field.name in own or hasattr(type(parent), field.name) else field.name
