"""Fusion compared with a slow reference implementation, and tokens of concepts and metadata."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from triderm_dist.models.concepts import SemanticTokens
from triderm_dist.models.fusion import STAGES, CrossAttention, FusionBlock, GlobalPooling
from triderm_dist.schema import MetadataField
from triderm_dist.tasks import milk10k_task

CONCEPTS = tuple("abcdef")
FIELDS = milk10k_task().fields


def attend(m: CrossAttention, query: Tensor, context: Tensor) -> Tensor:
    """Cross-attention with an explicit softmax, one lesion and one head at a time."""
    out = torch.zeros_like(query)
    head = query.shape[-1] // m.heads
    for b in range(len(query)):
        q, k, v = (
            x @ linear.weight.T + linear.bias
            for x, linear in ((query[b], m.query), (context[b], m.key), (context[b], m.value))
        )
        parts = []
        for h in range(m.heads):
            cut = slice(h * head, (h + 1) * head)
            scores = q[:, cut] @ k[:, cut].T / math.sqrt(head)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            parts.append(weights @ v[:, cut])
        out[b] = torch.cat(parts, 1) @ m.out.weight.T + m.out.bias
    return out


def norm(m: nn.LayerNorm, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + m.eps).sqrt() * m.weight + m.bias


def mlp(m: nn.Sequential, x: Tensor) -> Tensor:
    hidden = x @ m[0].weight.T + m[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ m[3].weight.T + m[3].bias


def reference(block: FusionBlock, pooling: GlobalPooling, derm: Tensor, clin: Tensor, semantic: Tensor) -> Tensor:
    """Both stages and the pooling, with a separate norm for each modality."""
    for stage, context in ((block.view_alignment, clin), (block.semantic_gating, semantic)):
        derm = derm + attend(stage.attention, norm(stage.query_norm, derm), norm(stage.context_norm, context))
        derm = derm + mlp(stage.mlp, norm(stage.mlp_norm, derm))
    return norm(pooling.norm, attend(pooling.attention, pooling.query.expand(len(derm), 1, -1), derm))[:, 0]


@pytest.mark.parametrize(("heads", "dermoscopic", "clinical"), [(1, 5, 5), (4, 6, 3)])
def test_fusion_equals_the_reference_forward_and_backward(heads: int, dermoscopic: int, clinical: int) -> None:
    torch.manual_seed(heads)
    block, pooling = FusionBlock(16, heads, 4.0, 0.3).eval(), GlobalPooling(16, heads, 0.3).eval()
    parameters = [*block.parameters(), *pooling.parameters()]
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn_like(parameter)
    inputs = [torch.randn(3, length, 16, requires_grad=True) for length in (dermoscopic, clinical, 4)]
    probe = torch.randn(3, 16)
    fast = pooling(block(*inputs))
    slow = reference(block, pooling, *inputs)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    # The key biases have no effect: softmax is invariant to a constant shift of the scores.
    gradients = [torch.autograd.grad((out * probe).sum(), [*parameters, *inputs]) for out in (fast, slow)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_in_bf16_on_a_cpu_equals_the_one_in_fp32() -> None:
    torch.manual_seed(0)
    attention, query, context = CrossAttention(16, 2, 0.0), torch.randn(3, 5, 16), torch.randn(3, 7, 16)

    def gradients() -> list[Tensor]:
        out = attention(query, context).float()
        return [out, *torch.autograd.grad(out.square().sum(), list(attention.parameters()))]

    reference = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.03 * reference[-1].abs().max().item())


def test_fusion_uses_dropout_in_training_only() -> None:
    block = FusionBlock(16, 2, 2.0, 0.5)
    x, y, z = (torch.randn(1, 4, 16) for _ in range(3))
    assert not torch.equal(block(x, y, z), block(x, y, z))
    block.eval()
    assert torch.equal(block(x, y, z), block(x, y, z))


def lesion(**changes: float) -> Tensor:
    values = {"age": 50.0, "sex": 0.0, "skin_tone": 2.0, "site": 3.0, **changes}
    return torch.tensor([[values[field.name] for field in FIELDS]])


@settings(max_examples=25, deadline=None)
@given(field=st.integers(0, len(CONCEPTS) - 1), a=st.floats(0, 1), b=st.floats(0, 1))
def test_concept_score_changes_its_own_token_only(field: int, a: float, b: float) -> None:
    torch.manual_seed(0)
    tokens = SemanticTokens(CONCEPTS, FIELDS, 8)
    scores = torch.full((3, len(CONCEPTS)), 0.5)
    scores[0, field], scores[1, field], scores[2, field] = a, b, float("nan")
    out = tokens(scores, lesion().expand(3, -1))
    assert out.shape == (3, len(CONCEPTS) + len(FIELDS) + 1, 8) == (3, len(tokens.names), 8)
    assert out.isfinite().all()
    others = [i for i in range(out.shape[1]) if i != field]
    assert torch.equal(out[0, others], out[1, others]) and torch.equal(out[0, others], out[2, others])
    # Directions are compared instead of lengths, since a norm may follow.
    direction = nn.functional.normalize(out[:, field], dim=-1)
    if abs(a - b) > 0.05:
        assert (direction[0] - direction[1]).abs().max() > 1e-3
    assert (direction[0] - direction[2]).abs().max() > 1e-3


def test_every_field_has_a_distinct_token_for_present_and_missing() -> None:
    torch.manual_seed(0)
    tokens = SemanticTokens(("a",), FIELDS, 8)
    plain = tokens(torch.tensor([[0.5]]), lesion())
    for position, field in enumerate(milk10k_task().field_names, start=1):
        seen = [plain[0, position]]
        for value in (1.0, float("nan")):
            out = tokens(torch.tensor([[0.5]]), lesion(**{field: value}))
            changed = (out != plain).any(-1)[0].nonzero().flatten().tolist()
            assert changed == [position] and tokens.names[position] == field
            seen.append(out[0, position])
        assert not torch.equal(seen[1], seen[2])
    assert tokens.names[-1] == "null"


def test_only_the_null_token_without_concepts_and_metadata() -> None:
    tokens = SemanticTokens((), (), 8)
    assert tokens(torch.rand(2, 2), lesion().expand(2, -1)).shape == (2, 1, 8) and tokens.names == ("null",)
    assert [name for name, _ in tokens.named_parameters()] == ["null"]


def test_attention_weights_equal_those_of_forward() -> None:
    """Multiplied with the values they give the output of `forward`, which does not compute them."""
    torch.manual_seed(0)
    m, query, context = CrossAttention(8, 1, 0.0), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(m.out(m.weights(query, context) @ m.value(context)), m(query, context))
    several = CrossAttention(8, 4, 0.0).weights(query, context)
    torch.testing.assert_close(several.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("stage", STAGES)
def test_block_without_a_stage_ignores_its_context(stage: str) -> None:
    torch.manual_seed(0)
    rest = [name for name in STAGES if name != stage]
    block = FusionBlock(16, 2, 2.0, 0.0, rest).eval()
    derm, clin, semantic = (torch.randn(2, n, 16) for n in (4, 5, 3))
    contexts = {"view_alignment": clin, "semantic_gating": semantic}
    before = block(derm, clin, semantic)
    contexts[stage].mul_(7)
    assert torch.equal(block(derm, clin, semantic), before)
    contexts[rest[0]].mul_(7)
    assert not torch.equal(block(derm, clin, semantic), before)


@pytest.mark.parametrize("name", ["training", "meanings", "names", "forward", "keys"])
@pytest.mark.parametrize("kind", ["number", "category"])
def test_field_may_have_the_name_of_an_attribute(name: str, kind: Any) -> None:
    field = MetadataField(name, name, kind, categories=() if kind == "number" else ("a", "b"))
    tokens = SemanticTokens(("c",), [field], 8)
    assert tokens.names == ("c", name, "null")
    assert tokens(torch.zeros(2, 1), torch.zeros(2, 1)).shape == (2, 3, 8)
    (prefix,) = tokens.meanings.keys() - {"concepts"}
    assert any(parameter.startswith(f"{prefix}.") for parameter, _ in tokens.named_parameters())
    assert tokens.meanings == {"concepts": ["c"], prefix: field.meaning()}
