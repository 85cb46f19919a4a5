"""FLOPs counted on fake tensors equal those counted by hooks on all layers of a real forward pass."""

import pytest
import torch
from torch import nn

from triderm_dist.config import ModelConfig, TowerConfig
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.concepts import NumericTokens
from triderm_dist.models.fusion import CrossAttention
from triderm_dist.models.network import ViewTokens
from triderm_dist.models.towers import TokenShape
from triderm_dist.monitoring.flops import TrainingCompute, named_peak, training_compute, training_flops
from triderm_dist.tasks import milk10k_task

SIGNATURE = milk10k_task().signature(tuple("abcde"))


def network_of(kind: str = "trimodal", tower: TokenShape | None = None, source: str = "timm:test_vit", **settings):
    config = ModelConfig(
        kind=kind, width=32, heads=2, tower=TowerConfig(source=source, pretrained=False, image_size=32, **settings)
    )
    return build_network(config, SIGNATURE, tower or build_towers(config.tower))


def by_hooks(network: nn.Module, image: torch.Tensor) -> float:
    """Return FLOPs per lesion by layer: one matrix product forward, and one backward per factor with a gradient."""
    total, handles = 0, []

    def count(flops: int, *needs_grad: bool) -> None:
        nonlocal total
        total += flops * (1 + sum(needs_grad))

    def linear(module, inputs, output):
        count(2 * output.numel() * module.in_features, inputs[0].requires_grad, module.weight.requires_grad)

    def convolution(module, inputs, output):
        flops = 2 * output.numel() * module.weight[0].numel()
        count(flops, inputs[0].requires_grad, module.weight.requires_grad)

    def attention(module, inputs, output):
        query, context = inputs[0], inputs[-1]
        flops = 2 * query.shape[0] * query.shape[1] * context.shape[1] * context.shape[2]
        needs_grad = output.requires_grad
        count(flops, needs_grad, needs_grad)  # query times key
        count(flops, needs_grad, needs_grad)  # weights times value

    def curve(module, inputs, output):
        count(2 * output.numel() * module.curve.shape[1], module.curve.requires_grad)

    def view_tokens(module, inputs, output):
        if (
            module.project is not None and not inputs[0].requires_grad
        ):  # a projection without a call of its linear layer
            count(2 * output.numel() * module.project[1].in_features, False, True)

    for module in network.modules():
        kinds = {nn.Linear: linear, nn.Conv2d: convolution, CrossAttention: attention, NumericTokens: curve}
        kinds[ViewTokens] = view_tokens
        hook = kinds.get(type(module)) or (attention if type(module).__name__ == "Attention" else None)
        if hook:
            handles.append(module.register_forward_hook(hook))
    lesions = len(image)
    with torch.enable_grad():
        network.train()
        network(
            image,
            image,
            torch.ones(lesions, 2, dtype=torch.bool),
            torch.rand(lesions, len(SIGNATURE.concepts)),
            torch.zeros(lesions, len(SIGNATURE.fields)),
        )
    for handle in handles:
        handle.remove()
    # A head calls F.linear in fp32, which has no hook; features and weight both have gradients.
    heads = [m.linear.weight for m in network.modules() if type(m).__name__ == "Head"]
    return total / lesions + sum(3 * 2 * weight.numel() for weight in heads)


@pytest.mark.parametrize(("clinical", "dermoscopic"), [(2, 0), (99, 99)])
def test_flops_equal_the_sum_over_layers(clinical, dermoscopic):
    network = network_of(freeze_clinical=clinical, freeze_dermoscopic=dermoscopic)
    assert training_flops(network) == by_hooks(network, torch.rand(2, 3, 32, 32))


def test_flops_of_a_network_on_tokens_and_of_a_cnn():
    tokens = network_of(tower=TokenShape(9, 24))
    assert training_flops(tokens) == by_hooks(tokens, torch.rand(2, 9, 24))
    # Depthwise convolutions: the formula of PyTorch would count 8 times as many FLOPs in the backward pass.
    cnn = network_of("dual_cnn", source="timm:test_efficientnet", freeze_clinical=0, freeze_dermoscopic=0)
    assert training_flops(cnn) == by_hooks(cnn, torch.rand(2, 3, 32, 32))


def test_counting_flops_leaves_gradients_and_weights_unchanged():
    network = network_of().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training_flops(network)
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peak_flops_by_device_name(name, tflops):
    assert named_peak(name) == (tflops and tflops * 1e12)


def test_mfu_covers_all_devices():
    assert TrainingCompute(flops=2e9, peak=1e12, devices=4, source="").mfu(lesions_per_s=1000) == 0.5
    network, cpu = network_of(tower=TokenShape(9, 24)), torch.device("cpu")
    assert training_compute(network, cpu, 1) is None
    given = training_compute(network, cpu, 2, peak_tflops=0.5)
    assert given and given.peak == 0.5e12 and given.flops == training_flops(network)
