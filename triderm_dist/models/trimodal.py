"""The tri-modal network: dermoscopic tokens attend to clinical ones, then to concepts and metadata, then are pooled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.concepts import SemanticTokens
from triderm_dist.models.fusion import STAGES, FusionBlock, GlobalPooling
from triderm_dist.models.network import Head, Network, ViewTokens
from triderm_dist.models.towers import TokenShape, Tower
from triderm_dist.schema import VIEWS, Outputs


class Attention(NamedTuple):
    """Where the pooled features of B lesions come from: each (B, L) or (B, S) sums to 1 a lesion.

    dermoscopic: the pooling query over the fused tokens, which stand at the dermoscopic patches.  clinical: over the
    clinical patches, by way of view alignment.  semantic: over `SemanticTokens.names`, by way of semantic gating.
    None for a stage that the network has not.
    """

    dermoscopic: Tensor
    clinical: Tensor | None
    semantic: Tensor | None


class TriModal(Network):
    """See `Network` for inputs. The auxiliary heads judge each view by the mean of its own tokens, before fusion."""

    def __init__(self, config: ModelConfig, concepts: Sequence[str], towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__(config, concepts, towers)
        width, dropout = config.width, config.dropout
        self.views = nn.ModuleDict(
            {view: ViewTokens(self.token_shape, width, view in self.used_views) for view in VIEWS}
        )
        self.semantic = (
            SemanticTokens(concepts, self.fields, width, "concepts" in config.use, "metadata" in config.use)
            if "semantic_gating" in config.fusion
            else None
        )
        self.fusion = nn.ModuleList(
            FusionBlock(width, config.heads, config.mlp_ratio, dropout, config.fusion) for _ in range(config.depth)
        )
        self.pooling = GlobalPooling(width, config.heads, dropout)
        self.head = Head(width, config.head, dropout)
        self.aux_norms = nn.ModuleDict({view: nn.LayerNorm(width) for view in VIEWS})
        self.aux_heads = nn.ModuleDict({view: Head(width, config.head, dropout) for view in VIEWS})

    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        views, semantic = self._inputs(tokens, present, concepts, metadata)
        fused = views["dermoscopic"]
        for block in self.fusion:
            fused = block(fused, views["clinical"], semantic)
        features = self.pooling(fused).float()
        aux = {view: self.aux_heads[view](self.aux_norms[view](views[view].mean(1))) for view in VIEWS}
        return Outputs(self.head(features), aux["clinical"], aux["dermoscopic"], features)

    @torch.no_grad()
    def attention(
        self, clinical: Tensor, dermoscopic: Tensor, view_present: Tensor, concepts: Tensor, metadata: Tensor
    ) -> Attention:
        """The attention behind `forward` of the same inputs.

        Each stage's weights are averaged over heads and blocks and weighted by the pooling query: one step of
        attention rollout (Abnar and Zuidema 2020) that leaves the residual path out, so it tells where a stage looks,
        not how much it matters.
        """
        tokens, present = self._views(clinical, dermoscopic, view_present)
        views, semantic = self._inputs(tokens, present, concepts, metadata)
        fused, looks = views["dermoscopic"], defaultdict(list)
        for block in self.fusion:
            for name, stage, context in block.stages(views["clinical"], semantic):  # type: ignore[operator]
                looks[name].append(stage.weights(fused, context))
                fused = stage(fused, context)
        pooled = self.pooling.weights(fused)
        aligned, gated = (
            torch.einsum("bq,bql->bl", pooled, torch.stack(looks[name]).mean(0)) if name in looks else None
            for name in STAGES
        )
        return Attention(pooled, aligned, gated)

    def _inputs(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Tokens (B, L, D) of each view, and semantic tokens (B, S, D), None where nothing attends to them."""
        views = {view: self.views[view](tokens.get(view), present[view]) for view in VIEWS}
        return views, self.semantic(concepts, metadata) if self.semantic else None

    def fusion_stages(self) -> list[nn.Module]:
        return [stage for block in self.fusion for stage in block.children()]
