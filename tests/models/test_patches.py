"""Patch embeddings as matrix products compute what convolutions do."""

import copy

import pytest
import torch
from torch import nn

from triderm_dist.models.patches import PatchConv2d, use_linear_patches


@pytest.mark.parametrize(("patch", "size", "bias"), [((8, 8), (16, 32), True), ((9, 8), (20, 17), False)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_as_a_matrix_product(patch, size, bias, memory_format):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 5, patch, stride=patch, bias=bias))
    ours = copy.deepcopy(plain)
    use_linear_patches(ours)
    assert type(ours[0]) is PatchConv2d and ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, *size).to(memory_format=memory_format)
    outputs = [network(x) for network in (plain, ours)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        (y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), plain(x), rtol=0.02, atol=0.02)


def test_only_patch_embeddings_are_replaced():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 16, stride=8), nn.Conv2d(8, 8, 8, stride=8, groups=2), nn.Conv2d(3, 8, 4, stride=4),
        nn.Conv2d(3, 8, 8, stride=8, padding=1),
    )  # fmt: skip
    use_linear_patches(network)
    assert all(type(module) is nn.Conv2d for module in network)
