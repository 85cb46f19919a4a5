"""The tri-modal network: dermoscopic tokens attend to clinical ones, then to concepts and metadata, then are pooled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.concepts import SemanticTokens
from triderm_dist.models.fusion import FusionBlock, GlobalPooling
from triderm_dist.models.network import Head, Network, ViewTokens
from triderm_dist.models.towers import TokenShape, Tower
from triderm_dist.schema import VIEWS, Outputs


class TriModal(Network):
    """See `Network` for inputs. The auxiliary heads judge each view by the mean of its own tokens, before fusion."""

    def __init__(self, config: ModelConfig, concepts: Sequence[str], towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__(config, concepts, towers)
        width, dropout = config.width, config.dropout
        self.views = nn.ModuleDict(
            {view: ViewTokens(self.token_shape, width, view in self.used_views) for view in VIEWS}
        )
        self.semantic = SemanticTokens(concepts, width, "concepts" in config.use, "metadata" in config.use)
        self.fusion = nn.ModuleList(
            FusionBlock(width, config.heads, config.mlp_ratio, dropout) for _ in range(config.depth)
        )
        self.pooling = GlobalPooling(width, config.heads, dropout)
        self.head = Head(width, config.head, dropout)
        self.aux_norms = nn.ModuleDict({view: nn.LayerNorm(width) for view in VIEWS})
        self.aux_heads = nn.ModuleDict({view: Head(width, config.head, dropout) for view in VIEWS})

    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        views = {view: self.views[view](tokens.get(view), present[view]) for view in VIEWS}
        semantic = self.semantic(concepts, metadata)
        fused = views["dermoscopic"]
        for block in self.fusion:
            fused = block(fused, views["clinical"], semantic)
        features = self.pooling(fused).float()
        aux = {view: self.aux_heads[view](self.aux_norms[view](views[view].mean(1))) for view in VIEWS}
        return Outputs(self.head(features), aux["clinical"], aux["dermoscopic"], features)

    def fusion_stages(self) -> list[nn.Module]:
        return [stage for block in self.fusion for stage in block.children()]
