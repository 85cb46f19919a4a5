"""Depthwise convolutions on CPUs equal those that they replace, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from triderm_dist.models.depthwise import DepthwiseConv2d, use_fast_depthwise


def convolution(kernel: int, stride: int, same: bool, bias: bool = False) -> nn.Conv2d:
    torch.manual_seed(0)
    if same:
        from timm.layers import Conv2dSame

        return Conv2dSame(6, 6, kernel, stride=stride, groups=6, bias=bias)
    return nn.Conv2d(6, 6, kernel, stride=stride, padding=kernel // 2, groups=6, bias=bias)


def results(module: nn.Module, dtype: torch.dtype, size: int) -> list[Tensor]:
    """Return the output, and the gradients of the input and of all parameters."""
    torch.manual_seed(1)
    x = torch.randn(3, 6, size, size + 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = module(x)
    assert y.dtype == dtype
    return [y, *torch.autograd.grad((y.float() * torch.randn(y.shape)).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(5, 1, 7), (5, 2, 12), (5, 2, 13), (7, 1, 9), (3, 2, 8)])
def test_depthwise_convolution_equals_the_replaced_one(
    kernel: int, stride: int, size: int, same: bool, dtype: torch.dtype
) -> None:
    module = convolution(kernel, stride, same, bias=stride == 1)
    network = nn.Sequential(module)
    expected = results(network, torch.float32, size)
    use_fast_depthwise(network)
    assert isinstance(network[0], DepthwiseConv2d)
    assert network[0].weight is module.weight
    for ours, reference in zip(results(network, dtype, size), expected, strict=True):
        atol = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype] * reference.abs().max().item()
        torch.testing.assert_close(ours.float(), reference, rtol=0, atol=atol)
    with torch.no_grad():
        assert torch.equal(network(torch.ones(1, 6, size, size)), module(torch.ones(1, 6, size, size)))


def test_only_trained_depthwise_convolutions_with_slow_gradients_are_replaced() -> None:
    frozen = nn.Conv2d(6, 6, 5, groups=6).requires_grad_(False)
    others = [nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 5), nn.Conv2d(6, 12, 5, groups=6), frozen]
    dilated, text = nn.Conv2d(6, 6, 5, groups=6, dilation=2), nn.Conv2d(6, 6, 5, groups=6, padding="same")
    network = nn.Sequential(*others, dilated, text, nn.Sequential(nn.Conv2d(6, 6, 5, groups=6)))
    names = list(network.state_dict())
    use_fast_depthwise(network)
    assert [type(module) for module in network[:6]] == [nn.Conv2d] * 6
    assert isinstance(network[6][0], DepthwiseConv2d)
    assert list(network.state_dict()) == names
