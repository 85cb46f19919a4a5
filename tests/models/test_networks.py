"""Both networks: shapes, missing views, gradients of every parameter, and learning."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.small_tasks import TASKS
from triderm_dist.config import ModelConfig
from triderm_dist.models import NETWORKS, build_network, build_towers, check_network
from triderm_dist.models.network import Network, ViewTokens
from triderm_dist.models.towers import TokenShape
from triderm_dist.models.trimodal import TriModal
from triderm_dist.schema import DIAGNOSES, VIEWS, ConfigError, Outputs
from triderm_dist.tasks import milk10k_task

CONCEPTS = ("clinical/hair", "dermoscopic/hair", "dermoscopic/veil")
SIGNATURE = milk10k_task().signature(CONCEPTS)
KINDS = ("trimodal", "dual_cnn")
ALL = ("clinical", "dermoscopic", "concepts", "metadata")


def config(kind: str, tower: str = "test_vit", **settings: Any) -> ModelConfig:
    tower_settings = {
        "source": f"timm:{tower}",
        "pretrained": False,
        "image_size": 64,
        "freeze_clinical": 2,
        "freeze_dermoscopic": 1,
        **settings.pop("tower_settings", {}),
    }
    return ModelConfig.model_validate({"kind": kind, "tower": tower_settings, "width": 32, "heads": 4, **settings})


def network_of(kind: str, tower: str = "test_vit", **settings: Any) -> Network:
    torch.manual_seed(0)
    c = config(kind, tower, **settings)
    return build_network(c, SIGNATURE, build_towers(c.tower))


def batch(size: int = 4, shape: tuple[int, ...] = (3, 64, 64)) -> list[Tensor]:
    """Return clinical, dermoscopic, view_present, concepts and metadata, each with missing values."""
    g = torch.Generator().manual_seed(1)
    present = torch.ones(size, 2, dtype=torch.bool)
    present[1, 0] = present[2, 1] = False
    concepts = torch.rand(size, len(CONCEPTS), generator=g)
    concepts[0, 1] = float("nan")
    metadata = torch.tensor([[55.0, 0, 2, 1]]).repeat(size, 1)
    metadata[3] = float("nan")
    return [torch.randn(size, *shape, generator=g), torch.randn(size, *shape, generator=g), present, concepts, metadata]


def total(outputs: tuple[Tensor, ...]) -> Tensor:
    """Return a loss over all heads, like the compound loss."""
    return sum((o.square().sum() for o in outputs.heads), torch.zeros(()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tri_modal"}, "'tri_modal' is not a network; known: dual_cnn, mlp, trimodal (plugins may add"),
        ({"settings": {"depth": 2}}, "models.NAME.settings of kind 'trimodal': unknown setting 'depth'"),
    ],
)
def test_unknown_network_or_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_network(ModelConfig.model_validate(settings))


def test_networks_are_imported_lazily() -> None:
    code = (
        "import sys, triderm_dist.models as m, triderm_dist.config as c; m.check_network(c.ModelConfig()); "
        "assert 'torch' not in sys.modules; m.network_class('trimodal'); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", ["test_vit", "test_efficientnet"])
@pytest.mark.parametrize("shared", [False, True])
def test_shapes_and_a_gradient_for_every_trained_parameter(kind: str, tower: str, shared: bool) -> None:
    network = network_of(kind, tower, tower_settings={"shared": shared}).train()
    outputs = network(*batch())
    for logits in outputs.heads:
        assert logits.shape == (4, len(DIAGNOSES)) and logits.dtype == torch.float32
    assert outputs.features.shape == (4, 32)
    total(outputs).backward()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name, p in network.named_parameters() if p.grad is not None} == trained
    grads = {name: (p, p.grad) for name, p in network.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for _, grad in grads.values())
    # DDP warns of others once per rank.
    assert [name for name, (p, grad) in grads.items() if grad.stride() != p.stride()] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", [ALL[:n] for n in (1, 2, 3)] + [ALL[1:], ALL[2:], ALL[3:], ("dermoscopic",)])
def test_unused_modalities_have_no_effect_and_no_parameters(kind: str, use: tuple[str, ...]) -> None:
    network = network_of(kind, use=use).train()
    inputs = batch()
    total(network(*inputs)).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    network.eval()
    first = network(*inputs)
    for position, modality in zip((0, 1, 3, 4), ALL, strict=True):
        changed = list(inputs)
        changed[position] = torch.rand_like(inputs[position]).round()
        same = torch.equal(network(*changed).logits, first.logits)
        assert same == (modality not in use), modality


STATE_NAMES = {
    "trimodal": "d65f9b874b2bf717",
    "dual_cnn": "b2694a82886138d3",
    "trimodal without clinical": "1319890b035357e9",
    "trimodal without photos": "973934e904ce606d",
    "trimodal without a table": "f7a487c9a3fad7b4",
    "dual_cnn without dermoscopic": "e1940c77e8187dd3",
    "dual_cnn without a table": "1a545bcd92635928",
    "trimodal of two alignments": "00a499fbee18eee6",
    "trimodal of gating": "97e72eba1d974baa",
    "trimodal with a shared tower": "c7ddfb1bfc7a9a0c",
}
"""SHA-256 of the names and shapes of all tensors at commit 977cc2e, before networks knew tasks."""
STATE_SETTINGS: dict[str, dict[str, Any]] = {
    "trimodal without clinical": {"use": ALL[1:]},
    "trimodal without photos": {"use": ALL[2:]},
    "trimodal without a table": {"use": ALL[:2]},
    "dual_cnn without dermoscopic": {"use": (ALL[0], *ALL[2:])},
    "dual_cnn without a table": {"use": ALL[:2]},
    "trimodal of two alignments": {"fusion": ["view_alignment"], "depth": 2},
    "trimodal of gating": {"fusion": ["semantic_gating"]},
    "trimodal with a shared tower": {"tower_settings": {"shared": True}},
}


@pytest.mark.parametrize("name", STATE_NAMES)
def test_checkpoints_of_earlier_versions_fit(name: str) -> None:
    c = config(name.split()[0], **STATE_SETTINGS.get(name, {}))
    signature = milk10k_task().signature(("clinical/a", "dermoscopic/a"))
    state = build_network(c, signature, build_towers(c.tower)).state_dict()
    names = json.dumps([[key, list(tensor.shape)] for key, tensor in state.items()])
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == STATE_NAMES[name]


NOT_BUILT = {
    "dermoscopic only": r"(towers|views|view_norms|aux_norms|aux_heads)\.clinical\.|.*\.view_alignment\.",
    "clinical only": r"(towers|views|view_norms|aux_norms|aux_heads)\.dermoscopic\.|.*\.view_alignment\.",
    "no concepts": r"semantic\.concepts\.",
    "no fields": r"semantic\.(age|categories)\.",
    "photos only": r"semantic\.|.*\.semantic_gating\.|table\.",
    "dermoscopic photos only": r"(towers|views|view_norms|aux_norms|aux_heads)\.clinical\.|fusion\..\.(view|sem)"
    r"|semantic\.|table\.",
}
"""Names of the tensors that a network of both kinds lacks for a task, compared with one for a task with everything."""


def small_network(kind: str, task: str, **settings: Any) -> Network:
    torch.manual_seed(0)
    c, signature = config(kind, **settings), TASKS[task].signature(TASKS[task].concepts.names)
    return build_network(c, signature, build_towers(c.tower, signature.views))


def small_batch(network: Network, size: int = 4) -> list[Tensor]:
    """Return the inputs of a network; (B, 0) for a view that the task lacks."""
    torch.manual_seed(1)
    signature, photos = network.signature, torch.randn(2, size, 3, 64, 64)
    views = [
        pixels if view in signature.views else torch.zeros(size, 0) for view, pixels in zip(VIEWS, photos, strict=True)
    ]
    present = torch.tensor([view in signature.views for view in VIEWS]).repeat(size, 1)
    metadata = torch.tensor([[30.0, 1.0]])[:, : len(signature.fields)].repeat(size, 1)
    return [*views, present, torch.rand(size, len(signature.concepts)), metadata]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", NOT_BUILT)
def test_parts_without_input_are_not_built(kind: str, task: str) -> None:
    complete, network = small_network(kind, "everything"), small_network(kind, task)
    assert set(network.state_dict()) == {name for name in complete.state_dict() if not re.match(NOT_BUILT[task], name)}
    smaller, larger = (sum(parameter.numel() for parameter in each.parameters()) for each in (network, complete))
    assert smaller < larger and network.left_out() and not complete.left_out()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shared", [False, True])
def test_every_parameter_of_a_smaller_network_gets_a_gradient(kind: str, task: str, shared: bool) -> None:
    network = small_network(kind, task, tower_settings={"shared": shared}).train()
    outputs = network(*small_batch(network))
    absent = [view for view in VIEWS if view not in network.signature.views]
    assert [view for view in VIEWS if getattr(outputs, f"aux_{view}") is None] == absent
    assert len(outputs.heads) == 3 - len(absent) and all(logits.shape == (4, 3) for logits in outputs.heads)
    total(outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
    if kind == "trimodal":
        attention = network.eval().attention(*small_batch(network))
        expected = [
            "dermoscopic" not in absent,
            bool(network.signature.views[0] == "clinical"),
            bool(network.signature.concepts or network.signature.fields),
        ]
        assert [part is not None for part in attention] == expected
        assert all(torch.allclose(part.sum(1), torch.ones(4)) for part in attention if part is not None)


def test_tower_of_a_single_view_is_frozen_as_set_for_it() -> None:
    towers = build_towers(config("trimodal").tower, ("dermoscopic",))
    assert [tower.frozen_blocks for tower in towers] == [1]
    assert [tower.frozen_blocks for tower in build_towers(config("trimodal").tower, ("clinical",))] == [2]


@pytest.mark.parametrize("use", [("clinical",), ("concepts", "metadata"), ()])
def test_network_without_input_is_refused(use: tuple[str, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"models.NAME.use: the network would have no input; the task has dermoscopic"
    ):
        small_network("trimodal", "dermoscopic photos only", use=use)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", ["test_vit", "test_efficientnet"])
def test_missing_view_has_no_effect(kind: str, tower: str) -> None:
    network = network_of(kind, tower).eval()
    inputs = batch()
    inputs[2][:] = True
    complete = network(*inputs)
    for view, name in enumerate(VIEWS):
        garbage = list(inputs)
        garbage[2] = inputs[2].clone()
        garbage[2][:, view] = False
        hidden = network(*garbage)
        garbage[view] = 1e3 * torch.randn_like(inputs[view])
        for a, b in zip(network(*garbage), hidden, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(hidden.logits, complete.logits)
        network.train()
        network.zero_grad()
        total(network(*garbage)).backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
        assert network.views[name].missing.grad.abs().sum() > 0
        network.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_hiding_a_photo_changes_no_other_lesion_with_batch_norm(kind: str) -> None:
    network = network_of(kind, "test_efficientnet", dropout=0.0).train()
    inputs = batch()
    inputs[2][:] = True
    complete = network(*inputs).logits
    inputs[2][0, 0] = False
    hidden = network(*inputs).logits
    assert not torch.equal(hidden[0], complete[0])
    assert torch.equal(hidden[1:], complete[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_lesions_of_a_batch_are_independent(kind: str) -> None:
    network = network_of(kind).eval()
    inputs = batch()
    single = [network(*(tensor[i : i + 1] for tensor in inputs)).logits for i in range(4)]
    torch.testing.assert_close(torch.cat(single), network(*inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_tokens_give_the_same_outputs_as_pixels(kind: str) -> None:
    c = config(kind, tower_settings={"frozen": True})
    towers = build_towers(c.tower)
    with_towers = build_network(c, SIGNATURE, towers).eval()
    shape = TokenShape(towers[0].num_tokens, towers[0].width)
    on_tokens = build_network(c, SIGNATURE, shape).eval()
    assert not any(name.startswith("towers.") for name in on_tokens.state_dict())
    on_tokens.load_state_dict({k: v for k, v in with_towers.state_dict().items() if not k.startswith("towers.")})
    inputs = batch()
    tokens = [tower.eval()(pixels) for tower, pixels in zip(towers, inputs, strict=False)]
    for a, b in zip(with_towers(*inputs), on_tokens(*tokens, *inputs[2:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    half = [t.half() for t in tokens]  # the precision of the token cache
    assert on_tokens(*half, *inputs[2:]).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_keeps_heads_in_float32(kind: str) -> None:
    network = network_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(*batch())
    assert all(o.dtype == torch.float32 for o in outputs)
    network.bfloat16()  # as under DeepSpeed
    outputs = network(*batch())
    assert all(o.dtype == torch.float32 and o.isfinite().all() for o in outputs)
    total(outputs).backward()


def test_training_on_cached_tokens_projects_them_as_evaluation_does() -> None:
    torch.manual_seed(0)
    view = ViewTokens(TokenShape(5, 48), 16, used=True).train()
    for parameter in view.project.parameters():
        parameter.data.normal_()
    tokens, present, weight = torch.randn(4, 5, 48) * 3 + 2, torch.tensor([True, True, False, True]), torch.randn(16)

    def gradients(tokens: Tensor) -> list[Tensor]:
        projected = view(tokens, present)
        return [projected, *torch.autograd.grad((projected * weight).square().sum(), list(view.parameters()))]

    fixed, general = gradients(tokens), gradients(tokens.clone().requires_grad_())
    for ours, reference in zip(fixed, general, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4 * reference.abs().max().item())
    assert torch.equal(view.eval()(tokens, present), view(tokens.clone().requires_grad_(), present))


@pytest.mark.parametrize("kind", KINDS)
def test_sigmoid_head_starts_at_the_prior(kind: str) -> None:
    network = network_of(kind, head="sigmoid").eval()
    with torch.no_grad():
        p = network(*batch()).logits.sigmoid()
    assert abs(float(p.mean()) - 1 / len(DIAGNOSES)) < 0.03
    assert network.head.linear.bias[0].item() == pytest.approx(-math.log(10))


def test_network_blocks_are_trained_tower_blocks_and_fusion_stages() -> None:
    network = network_of("trimodal", depth=2)
    kinds = [type(block).__name__ for block in network.blocks()]
    assert kinds == ["Block"] * 4 + ["Block"] * 5 + ["ViewAlignment", "SemanticGating"] * 2
    frozen = network_of("dual_cnn", tower_settings={"frozen": True})
    assert frozen.blocks() == []


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_give_the_same_gradients(kind: str) -> None:
    import functools

    from torch.utils.checkpoint import checkpoint

    gradients = []
    for checkpointed in (False, True):
        network = network_of(kind, dropout=0.0)
        if checkpointed:
            for block in network.blocks():
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        total(network(*batch())).backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal", ["clinical", "dermoscopic", "concepts", "metadata"])
def test_networks_learn_from_each_modality(kind: str, signal: str) -> None:
    """A network on tokens generalizes to held-out lesions of four diagnoses that only one modality separates."""
    torch.manual_seed(0)
    shape = TokenShape(4, 8)
    network = build_network(config(kind, dropout=0.0), SIGNATURE, shape)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    patterns = torch.randn(4, 4, 8)

    def draw(size: int) -> tuple[list[Tensor], Tensor]:
        labels = torch.randint(0, 4, (size,))
        views = [torch.randn(size, 4, 8) + (2 * patterns[labels] if signal == view else 0) for view in VIEWS]
        present = torch.rand(size, 2) > (0.0 if signal in VIEWS else 0.2)
        concepts = torch.rand(size, len(CONCEPTS))
        if signal == "concepts":
            concepts[:, 1] = labels / 3
        metadata = torch.full((size, len(SIGNATURE.fields)), float("nan"))
        if signal == "metadata":
            metadata[:, SIGNATURE.field_names.index("site")] = labels.float()
        return [*views, present, concepts, metadata], labels

    for _, (inputs, labels) in zip(range(100), (draw(32) for _ in itertools.count()), strict=False):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(*inputs).logits, labels).backward()
        optimizer.step()
    network.eval()
    inputs, labels = draw(200)
    assert (network(*inputs).logits.argmax(1) == labels).float().mean() > 0.9


def test_trimodal_with_towers_overfits_a_small_batch() -> None:
    network = network_of("trimodal", dropout=0.0).train()
    inputs, labels = batch(8), torch.arange(8) % 4
    inputs[2][:] = True
    inputs[1] += labels.view(-1, 1, 1, 1) - 1.5
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(*inputs).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.1


@pytest.mark.parametrize("fusion", [("view_alignment",), ("semantic_gating",), ("view_alignment", "semantic_gating")])
@pytest.mark.parametrize("depth", [1, 2])
def test_attention_of_each_fusion_stage(fusion: tuple[str, ...], depth: int) -> None:
    network = network_of("trimodal", fusion=fusion, depth=depth).train()
    total(network(*batch())).backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    attention = network.eval().attention(*batch())
    assert attention.dermoscopic.shape == (4, 16)
    for stage, part, tokens in (("view_alignment", attention.clinical, 16), ("semantic_gating", attention.semantic, 8)):
        assert (part is not None) == (stage in fusion)
        if part is not None:
            assert part.shape == (4, tokens)
            torch.testing.assert_close(part.sum(1), torch.ones(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_exported_network_takes_any_batch_size(kind: str, shared: bool) -> None:
    network = network_of(kind, tower_settings={"shared": shared}).eval()
    inputs = batch(4)
    size = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, tuple(inputs), dynamic_shapes=tuple({0: size} for _ in inputs)).module()
    for n in (1, 2, 7):
        part = [torch.cat([each, each])[:n] for each in inputs]
        torch.testing.assert_close(exported(*part).logits, network(*part).logits)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda z, x: z, "returned a Tensor, not Outputs"),
        (lambda z, x: (z, z, z, x), "returned a tuple, not Outputs"),
        (lambda z, x: Outputs(z[:, :5], z, z, x), "returned logits, torch.float32 (4, 5), not a tensor (4, 11)"),
        (lambda z, x: Outputs(z[:1], z, z, x), "returned logits, torch.float32 (1, 11), not a tensor (4, 11)"),
        (lambda z, x: Outputs(z, z, z, x[:3, :5]), "returned features, torch.float32 (3, 5), not a tensor (4, D)"),
        (lambda z, x: Outputs(z, None, None, x), "returned no aux_clinical; return the main logits for a view without"),
        (lambda z, x: Outputs(z, z, z, x[:, 0]), "returned features, torch.float32 (4,), not a tensor (4, D)"),
        (lambda z, x: Outputs(z, z.tolist(), z, x), "returned aux_clinical, a list, not a tensor (4, 11)"),
        (lambda z, x: Outputs(z, z, z, None), "returned features, a NoneType, not a tensor (4, D)"),
    ],
)
def test_outputs_that_are_not_what_the_loss_expects_are_refused(
    outputs: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without auxiliary logits a loss that counts on them would weight the main ones higher."""

    class Mean(Network):
        def fuse(self, tokens: Any, present: Any, concepts: Tensor, metadata: Tensor) -> Any:
            features = sum(each.mean(1) for each in tokens.values())
            return outputs(features[:, : len(DIAGNOSES)], features)

        def fusion_stages(self) -> list[torch.nn.Module]:
            return []

    monkeypatch.setitem(NETWORKS, "mean", Mean)
    with pytest.raises(ConfigError, match=re.escape(f"models.NAME.kind: fuse of the network 'mean' {message}")):
        network_of("mean")(*batch())


class WithAge(NamedTuple):
    """Outputs and a predicted age."""

    logits: Tensor
    aux_clinical: Tensor | None
    aux_dermoscopic: Tensor | None
    features: Tensor
    age: Tensor
    heads = Outputs.heads


def test_what_a_network_returns_for_its_loss_is_returned_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Aged(TriModal):
        def fuse(self, tokens: Any, present: Any, concepts: Tensor, metadata: Tensor) -> Any:
            outputs = super().fuse(tokens, present, concepts, metadata)
            return WithAge(*outputs, outputs.features.mean(1))

    monkeypatch.setitem(NETWORKS, "aged", Aged)
    aged, plain = network_of("aged"), network_of("trimodal")
    trained = aged.train()(*batch())
    assert isinstance(trained, WithAge) and trained.age.shape == (4,) and len(trained.heads) == 3
    predicted, expected = aged.eval()(*batch()), plain.eval()(*batch())
    assert type(predicted) is Outputs
    assert all(torch.equal(one, other) for one, other in zip(predicted, expected, strict=True))


def test_entries_that_are_no_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry, message in (
        ("function", lambda config, signature, towers: None, "'function' of NETWORKS is no subclass of Network"),
        ("module", torch.nn.Identity, "'module' of NETWORKS is no subclass of Network"),
        ("unfinished", type("Unfinished", (Network,), {}), "'unfinished' of NETWORKS has no method fuse"),
    ):
        monkeypatch.setitem(NETWORKS, name, entry)
        with pytest.raises(ConfigError, match=re.escape(f"models.NAME.kind: {message}")):
            check_network(config(name))
