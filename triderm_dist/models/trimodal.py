"""The tri-modal network: dermoscopic tokens attend to clinical ones, then to concepts and metadata, and are pooled.

Tasks with one view have no view alignment: that view's tokens attend to concepts and metadata. Tasks without concepts
and metadata have no semantic gating.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triderm_dist.config import ModelConfig
from triderm_dist.models.concepts import SemanticTokens
from triderm_dist.models.fusion import STAGES, FusionBlock, GlobalPooling
from triderm_dist.models.network import Head, Network, ViewTokens
from triderm_dist.models.tower import TokenShape, Tower
from triderm_dist.schema import Outputs, Signature


class Attention(NamedTuple):
    """Attention weights behind the pooled features of B lesions, (B, L) or (B, S); they sum to 1 for each lesion.

    dermoscopic: of the pooling query over the fused tokens, one for each dermoscopic patch.  clinical: over the
    clinical patches, through view alignment; of the pooling query where the task has no dermoscopic view.  semantic:
    over `SemanticTokens.names`, through semantic gating. None if the network does not have the stage or the view.
    """

    dermoscopic: Tensor | None
    clinical: Tensor | None
    semantic: Tensor | None


class TriModal(Network):
    """Fuse dermoscopic tokens with clinical and semantic ones by cross-attention, pool them by attention, classify.

    See `Network` for the inputs. The auxiliary heads classify each view by the mean of its tokens before fusion.
    """

    compiled_methods = ("_inputs", "_outputs")

    def __init__(self, config: ModelConfig, signature: Signature, towers: Sequence[Tower] | TokenShape) -> None:
        super().__init__(config, signature, towers)
        width, dropout, classes = config.width, config.dropout, len(signature.diagnoses)
        stages = [stage for stage in _possible_stages(signature) if stage in config.fusion]
        self.views = nn.ModuleDict(
            {view: ViewTokens(self.token_shape, width, view in self.used_views) for view in signature.views}
        )
        self.semantic = (
            SemanticTokens(self.used_concepts, self.used_fields, width) if "semantic_gating" in stages else None
        )
        self.fusion = nn.ModuleList(
            FusionBlock(width, config.heads, config.mlp_ratio, dropout, stages)
            for _ in range(config.depth if stages else 0)
        )
        self.pooling = GlobalPooling(width, config.heads, dropout)
        self.head = Head(width, classes, config.head, dropout)
        self.aux_norms = nn.ModuleDict({view: nn.LayerNorm(width) for view in signature.views})
        self.aux_heads = nn.ModuleDict({view: Head(width, classes, config.head, dropout) for view in signature.views})

    def fuse(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> Outputs:
        views, semantic = self._inputs(tokens, present, concepts, metadata)
        fused = views[self.pooled_view]
        for block in self.fusion:
            fused = block(fused, views.get("clinical"), semantic)
        return self._outputs(fused, views)

    @property
    def pooled_view(self) -> str:
        """The view whose tokens attend to the others and are pooled: the dermoscopic one where the task has it."""
        return self.signature.views[-1]

    def parameter_meanings(self) -> dict[str, Any]:
        diagnoses = self.signature.diagnoses
        semantic = self.semantic.meanings if self.semantic else {}
        return {
            "head": diagnoses, "aux_heads": diagnoses, **{f"semantic.{name}": each for name, each in semantic.items()}
        }  # fmt: skip

    def left_out(self) -> list[str]:
        possible = _possible_stages(self.signature)
        return [*super().left_out(), *(stage.replace("_", " ") for stage in STAGES if stage not in possible)]

    @torch.no_grad()
    def attention(
        self, clinical: Tensor, dermoscopic: Tensor, view_present: Tensor, concepts: Tensor, metadata: Tensor
    ) -> Attention:
        """Return the attention weights of `forward` for the same inputs.

        The weights of each stage are averaged over heads and blocks and weighted by the pooling query. This is one step
        of attention rollout (Abnar and Zuidema 2020) without the residual path, so it shows what a stage attends to,
        not how much the stage contributes.
        """
        tokens, present = self._views(clinical, dermoscopic, view_present)
        views, semantic = self._inputs(tokens, present, concepts, metadata)
        fused, weights = views[self.pooled_view], defaultdict(list)
        for block in self.fusion:
            for name, stage, context in block.stages(views.get("clinical"), semantic):  # type: ignore[operator]
                weights[name].append(stage.weights(fused, context))
                fused = stage(fused, context)
        pooled = self.pooling.weights(fused)
        aligned, gated = (
            torch.einsum("bq,bql->bl", pooled, torch.stack(weights[name]).mean(0)) if name in weights else None
            for name in STAGES
        )
        return Attention(pooled, aligned, gated) if "dermoscopic" in views else Attention(None, pooled, gated)

    def _inputs(
        self, tokens: dict[str, Tensor], present: dict[str, Tensor], concepts: Tensor, metadata: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return tokens (B, L, D) of each view, and semantic tokens (B, S, D) or None without semantic gating."""
        views = {view: self.views[view](tokens.get(view), present[view]) for view in self.signature.views}
        return views, self.semantic(concepts, metadata) if self.semantic else None

    def _outputs(self, fused: Tensor, views: dict[str, Tensor]) -> Outputs:
        features = self.pooling(fused).float()
        aux = {view: self.aux_heads[view](self.aux_norms[view](tokens.mean(1))) for view, tokens in views.items()}
        return Outputs(self.head(features), aux.get("clinical"), aux.get("dermoscopic"), features)

    def fusion_stages(self) -> list[nn.Module]:
        return [stage for block in self.fusion for stage in block.children()]


def _possible_stages(signature: Signature) -> list[str]:
    """Return the stages of a fusion block for which the task has the tokens to attend to."""
    has_context = (len(signature.views) > 1, bool(signature.concepts or signature.fields))
    return [stage for stage, possible in zip(STAGES, has_context, strict=True) if possible]
