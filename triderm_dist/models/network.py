"""What every network shares: towers or tokens in, `Outputs` out, a missing view replaced by learned tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.concepts import learned_token
from triderm_dist.models.towers import TokenShape, Tower
from triderm_dist.schema import DIAGNOSES, METADATA_FIELDS, VIEWS, Outputs

SHARED = "shared"


class Network(nn.Module, ABC):
    """Both views, concepts and metadata of B lesions to `Outputs`, in one forward.

    Given towers (one for both views, or one a view) it takes pixels (B, 3, H, W); given a `TokenShape` it takes tokens
    (B, L, width) of a tower that ran before. Nothing of a view whose `view_present` is False reaches the outputs: its
    pixels may be anything finite. They do pass the tower, so that a photo that training hides stays a photo for its
    batch norms. Modalities outside `config.use` have no tower and no projection here, and count as missing. Every
    trainable parameter takes part in every forward, as DDP asks.
    """

    def __init__(self, config: ModelConfig, concepts: Sequence[str], towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__()
        self.concept_names = tuple(concepts)
        self.fields = tuple(METADATA_FIELDS.values())
        self.used_views: tuple[str, ...] = tuple(view for view in VIEWS if view in config.use)
        self.towers = nn.ModuleDict()
        if isinstance(towers, TokenShape):
            self.token_shape = towers
        else:
            self.token_shape = TokenShape(towers[0].num_tokens, towers[0].width)
            if len(towers) == 1 and self.used_views:
                self.towers[SHARED] = towers[0]
            elif len(towers) > 1:
                self.towers.update(
                    {view: tower for view, tower in zip(VIEWS, towers, strict=True) if view in self.used_views}
                )
        self.holds_towers = not isinstance(towers, TokenShape)

    def forward(
        self, clinical: Tensor, dermoscopic: Tensor, view_present: Tensor, concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        """clinical, dermoscopic: pixels (B, 3, H, W) or tokens (B, L, width).

        view_present: (B, 2) bool, in the order of `VIEWS`. concepts: (B, K), metadata: (B, M), NaN where missing.
        """
        tokens, present = self._views(clinical, dermoscopic, view_present)
        return self.fuse(tokens, present, concepts, metadata)

    @abstractmethod
    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        """tokens: (B, L, width) of each used view; present: (B,) bool of each view."""

    @abstractmethod
    def fusion_stages(self) -> list[nn.Module]:
        """The parts after the towers that are worth checkpointing and compiling one by one."""

    def blocks(self) -> list[nn.Module]:
        """Units of activation checkpointing and compilation: tower blocks that are trained, and fusion stages."""
        return [*(block for tower in self._towers() for block in tower.trained_blocks), *self.fusion_stages()]

    def parameter_depths(self) -> dict[str, int]:
        """Every parameter's distance from the heads, for layer-wise learning rates.

        0: heads, fusion, concepts, projections. Block i of a tower's n: n - i, counted from the top for each tower by
        itself. Its tail goes with its last block, 1; its stem (patch embedding, class token, positions) is n + 1.
        """
        depths = {name: 0 for name, _ in self.named_parameters()}
        for name in depths:
            parts = name.split(".")
            if parts[0] == "towers":
                depth = len(self.towers[parts[1]].blocks)  # type: ignore[arg-type]
                depths[name] = {"stem": depth + 1, "tail": 1}.get(parts[2]) or depth - int(parts[3])
        return depths

    def _views(
        self, clinical: Tensor, dermoscopic: Tensor, view_present: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tokens (B, L, width) of the used views, and (B,) bool of each view."""
        images = dict(zip(VIEWS, (clinical, dermoscopic), strict=True))
        present = dict(zip(VIEWS, view_present.unbind(1), strict=True))
        return self._tokens({view: images[view] for view in self.used_views}), present

    def _towers(self) -> list[Tower]:
        return list(self.towers.values())  # type: ignore[arg-type]

    def _tokens(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.holds_towers or not images:
            return images
        if SHARED in self.towers:
            # One pass over both views; batch norms then see both, too.
            tokens = self.towers[SHARED](torch.cat(list(images.values())))
            return dict(zip(images, tokens.chunk(len(images)), strict=True))
        return {view: self.towers[view](pixels) for view, pixels in images.items()}


class ViewTokens(nn.Module):
    """A view's tokens (B, L, width) normed and projected to (B, L, D), or L learned tokens where the view is missing.

    A view that the network does not use has the learned tokens only.
    """

    def __init__(self, shape: TokenShape, width: int, used: bool) -> None:
        super().__init__()
        self.missing = learned_token(1, shape.num_tokens, width)
        self.project = nn.Sequential(nn.LayerNorm(shape.width), nn.Linear(shape.width, width)) if used else None

    def forward(self, tokens: Tensor | None, present: Tensor) -> Tensor:
        if self.project is None or tokens is None:
            return self.missing.expand(len(present), -1, -1)
        projected = self.project(tokens.to(self.missing.dtype))
        return torch.where(present[:, None, None], projected, self.missing)


class Head(nn.Module):
    """Features (B, D) to logits (B, C) in float32, whatever the precision around it.

    A sigmoid head starts at the prior of one diagnosis in C, logit -log(C - 1): else the negatives, C - 1 in C, drive
    the first steps (RetinaNet's trick, Lin et al. 2017).
    """

    def __init__(self, width: int, kind: str, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, len(DIAGNOSES))
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, -math.log(len(DIAGNOSES) - 1) if kind == "sigmoid" else 0.0)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.dropout(features.float()), self.linear.weight.float(), self.linear.bias.float())
