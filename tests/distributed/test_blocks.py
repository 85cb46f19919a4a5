"""Blocks of a network: all of them run compiled, and weights cast together give the numbers of autocast."""

import pytest
import torch
from torch import nn

from triderm_dist.config import Experiment, load
from triderm_dist.distributed.blocks import prepare_blocks
from triderm_dist.models.network import Network
from triderm_dist.models.towers import TokenShape
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.monitoring.memory_estimate import network_without_weights
from triderm_dist.schema import Outputs
from triderm_dist.tasks import milk10k_task

LESIONS = 2
SIGNATURE = milk10k_task().signature(("clinical/a", "dermoscopic/a"))


def network_of(kind: str, tower: str, frozen: int = 1) -> Network:
    torch.manual_seed(0)
    model = load(
        Experiment, None,
        [
            f"models.m={{kind: {kind}, width: 32, heads: 2, dropout: 0}}",
            f"models.m.tower={{source: 'timm:{tower}', image_size: 32, freeze_clinical: {frozen}}}",
            f"models.m.tower.freeze_dermoscopic={frozen}",
        ],
    ).models["m"]  # fmt: skip
    return network_without_weights(model, SIGNATURE)[0]


def run(network: Network, gradients: bool) -> list[torch.Tensor]:
    inputs = [
        values + torch.linspace(0, 1, values.numel()).view(values.shape) for values in example_inputs(network, LESIONS)
    ]
    inputs[2] = inputs[2] > 0
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        heads = network(*inputs).heads
        if gradients:
            sum((i + 1) * logits.square().sum() for i, logits in enumerate(heads)).backward()
    return [logits.detach() for logits in heads]


def gradients_of(network: Network) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


class Stages(Network):
    """A network on tokens with small stages of different widths, all with the `forward` of `nn.Sequential`."""

    def __init__(self, number: int) -> None:
        model = load(Experiment, None, ["models.m.kind=dual_cnn"]).models["m"]
        super().__init__(model, SIGNATURE, TokenShape(1, 4))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4 + i), nn.GELU(), nn.Linear(4 + i, 4)) for i in range(number)
        )

    def fuse(self, tokens, present, concepts, metadata) -> Outputs:
        features = tokens["dermoscopic"].mean(1)
        for stage in self.stages:
            features = stage(features)
        logits = nn.functional.pad(features, (0, len(self.signature.diagnoses) - 4))
        return Outputs(logits, logits, logits, features)

    def fusion_stages(self) -> list[nn.Module]:
        return list(self.stages)


def assert_all_blocks_compiled(network: Network, checkpointing: bool) -> None:
    """Count the calls of compiled graphs: one for each block and method, one more where a backward pass repeats it."""
    calls = 0

    def counting(graph, inputs):
        def counted(*inputs):
            nonlocal calls
            calls += 1
            return graph.forward(*inputs)

        return counted

    torch.compiler.reset()
    prepare_blocks(network, checkpointing, compile_blocks=True, backend=counting)
    for training, gradients in ((True, False), (True, True), (False, False), (True, True)):
        calls = 0
        run(network.train(training), gradients)
        repeated = len(network.blocks()) if checkpointing and gradients else 0
        assert calls == len(network.all_blocks()) + len(network.compiled_methods) + repeated


def test_every_block_runs_compiled_in_training_first_pass_and_evaluation():
    assert_all_blocks_compiled(Stages(9), checkpointing=False)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "tower"), [("trimodal", "test_vit"), ("dual_cnn", "test_efficientnet")])
def test_every_block_of_a_network_runs_compiled(kind, tower, checkpointing):
    assert_all_blocks_compiled(network_of(kind, tower), checkpointing)


@pytest.mark.parametrize(("kind", "tower"), [("trimodal", "test_vit"), ("dual_cnn", "test_efficientnet")])
def test_weights_cast_together_give_the_numbers_of_autocast(kind, tower):
    plain, ours = network_of(kind, tower), network_of(kind, tower)
    prepare_blocks(ours, activation_checkpointing=kind == "trimodal", compile_blocks=False)
    for gradients in (True, True, False):
        for expected, found in zip(run(plain, gradients), run(ours, gradients), strict=True):
            assert torch.equal(expected, found)
    expected, found = gradients_of(plain), gradients_of(ours)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_changed_frozen_weights_are_cast_again():
    network = network_of("trimodal", "test_vit")
    prepare_blocks(network, False, compile_blocks=False)
    before = run(network.eval(), gradients=False)
    with torch.no_grad():
        network.all_blocks()[0].attn.qkv.weight.mul_(-2)
    assert not torch.equal(before[0], run(network, gradients=False)[0])
