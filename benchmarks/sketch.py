"""The build guide's network and training step, made runnable with as few changes as possible.

Kept on purpose, since it is what `benchmarks.step` measures against: attention with the softmax written out, one norm
for queries and keys, embeddings that stay trainable below frozen blocks (so that the backward pass walks through them),
metadata that is not used, separate losses of each batch, and `.item()` after every batch. Changed: what the guide calls
and never defines (the classifier, the auxiliary heads), the call that makes open_clip return tokens, `torch.autocast`,
and the number of concepts, which is the data's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triderm_dist.schema import DIAGNOSES


class DermLIPEncoder(nn.Module):
    """open_clip's visual tower with its first blocks frozen; returns patch tokens."""

    def __init__(self, vision: dict[str, int], freeze_layers: int) -> None:
        super().__init__()
        import open_clip

        settings = {
            "embed_dim": 512,
            "vision_cfg": vision,
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
        }
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "sketch.json")
            file.write_text(json.dumps(settings), encoding="utf-8")
            open_clip.add_model_config(file)
        self.visual: Any = open_clip.create_model("sketch", load_weights=False).visual
        self.visual.output_tokens = True
        for parameter in self.visual.conv1.parameters():
            parameter.requires_grad = False
        for block in self.visual.transformer.resblocks[:freeze_layers]:
            for parameter in block.parameters():
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)[1]


class MultiHeadCrossAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scale = self.head_dim**-0.5
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, l_q, d = query.shape
        l_kv = key.shape[1]
        q = self.q_proj(query).view(b, l_q, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(key).view(b, l_kv, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(value).view(b, l_kv, self.num_heads, self.head_dim).transpose(1, 2)
        attn = torch.matmul(q, k.transpose(-2, -1)) * self.scale
        attn = self.dropout(F.softmax(attn, dim=-1))
        return self.out_proj(torch.matmul(attn, v).transpose(1, 2).contiguous().view(b, l_q, d))


class TMCTFusionBlock(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int = 8, mlp_ratio: float = 4.0, dropout: float = 0.1) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.view_align_attn = MultiHeadCrossAttention(embed_dim, num_heads, dropout)
        self.view_align_norm1, self.view_align_norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.semantic_gate_attn = MultiHeadCrossAttention(embed_dim, num_heads, dropout)
        self.semantic_gate_norm1, self.semantic_gate_norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.mlp1, self.mlp2 = (
            nn.Sequential(
                nn.Linear(embed_dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed_dim),
                nn.Dropout(dropout),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, f_derm: Tensor, f_clin: Tensor, f_concept: Tensor) -> Tensor:
        clin = self.view_align_norm1(f_clin)
        aligned = f_derm + self.view_align_attn(self.view_align_norm1(f_derm), clin, clin)
        aligned = aligned + self.mlp1(self.view_align_norm2(aligned))
        concept = self.semantic_gate_norm1(f_concept)
        fused = aligned + self.semantic_gate_attn(self.semantic_gate_norm1(aligned), concept, concept)
        return fused + self.mlp2(self.semantic_gate_norm2(fused))


class GlobalContextPooling(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.attention = MultiHeadCrossAttention(embed_dim, num_heads, dropout)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(self.query.expand(x.shape[0], -1, -1), x, x)).squeeze(1)


class MONETConceptEmbedding(nn.Module):
    def __init__(self, num_concepts: int, embed_dim: int, hidden_dim: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.concept_embeddings = nn.Parameter(torch.randn(num_concepts, embed_dim) * 0.02)
        self.score_proj = nn.Sequential(
            nn.Linear(1, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim), nn.Tanh()
        )
        self.norm, self.dropout = nn.LayerNorm(embed_dim), nn.Dropout(dropout)

    def forward(self, scores: Tensor) -> Tensor:
        concepts = self.concept_embeddings.unsqueeze(0).expand(scores.shape[0], -1, -1)
        return self.dropout(self.norm(concepts * (1 + self.score_proj(scores.unsqueeze(-1)))))


class SketchNetwork(nn.Module):
    """The guide's tri-modal network; `vision` is open_clip's vision_cfg."""

    def __init__(
        self, vision: dict[str, int], num_concepts: int, freeze_clinical: int = 6, freeze_dermoscopic: int = 4
    ) -> None:
        super().__init__()
        width = vision["width"]
        self.clinical_encoder = DermLIPEncoder(vision, freeze_clinical)
        self.dermoscopic_encoder = DermLIPEncoder(vision, freeze_dermoscopic)
        self.concept = MONETConceptEmbedding(num_concepts, width)
        self.fusion = TMCTFusionBlock(width)
        self.pool = GlobalContextPooling(width)
        self.classifier = nn.Linear(width, len(DIAGNOSES))
        self.aux_clinical = nn.Linear(width, len(DIAGNOSES))
        self.aux_dermoscopic = nn.Linear(width, len(DIAGNOSES))

    def forward(self, clinical: Tensor, dermoscopic: Tensor, scores: Tensor, metadata: Tensor) -> dict[str, Tensor]:
        f_clin, f_derm = self.clinical_encoder(clinical), self.dermoscopic_encoder(dermoscopic)
        fused = self.fusion(f_derm, f_clin, self.concept(scores))
        return {
            "main": self.classifier(self.pool(fused)),
            "aux_clinical": self.aux_clinical(f_clin.mean(1)),
            "aux_dermoscopic": self.aux_dermoscopic(f_derm.mean(1)),
        }


def layer_wise_groups(model: nn.Module, base_lr: float = 1e-4, decay_rate: float = 0.9) -> list[dict[str, Any]]:
    """Return the guide's parameter groups, by substrings of names."""
    head: list[nn.Parameter] = []
    backbone: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "classifier" in name or "fusion" in name or "concept" in name:
            head.append(parameter)
        else:
            parts = name.split(".")
            layer = int(parts[parts.index("resblocks") + 1]) if "resblocks" in parts else -1
            backbone.setdefault(layer, []).append(parameter)
    top = max(backbone)
    groups = [{"params": params, "lr": base_lr * decay_rate ** (top - layer + 1)} for layer, params in backbone.items()]
    return [{"params": head, "lr": base_lr}, *groups]


def compound_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute focal and soft F1 of one batch, half each, as in the guide: sigmoid, no class mask."""
    probs = torch.sigmoid(logits)
    p_t = probs * targets + (1 - probs) * (1 - targets)
    focal = ((1 - p_t) ** 2.0 * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).mean()
    tp, fp, fn = (probs * targets).sum(0), (probs * (1 - targets)).sum(0), ((1 - probs) * targets).sum(0)
    return 0.5 * focal + 0.5 * (1 - (2 * tp / (2 * tp + fp + fn + 1e-7)).mean())


def modality_dropout(clinical: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    shown = torch.rand(clinical.shape[0], 1, 1, 1, device=clinical.device) > 0.2
    return clinical * shown.float(), scores * (torch.rand_like(scores) > 0.1).float()


def train_batches(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device,
    bf16: bool,
) -> float:
    """Run the guide's loop over batches of clinical_image, dermoscopic_image, monet_scores, metadata, targets."""
    model.train()
    total = 0.0
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        clinical, scores = modality_dropout(inputs["clinical_image"], inputs["monet_scores"])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = model(clinical, inputs["dermoscopic_image"], scores, inputs["metadata"])
            losses = {name: compound_loss(logits, inputs["targets"]) for name, logits in outputs.items()}
            loss = losses["main"] + 0.3 * losses["aux_clinical"] + 0.3 * losses["aux_dermoscopic"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total
