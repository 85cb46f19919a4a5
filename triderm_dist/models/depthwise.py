"""Depthwise convolutions with fast gradients on CPUs, where PyTorch's take most of the time of a step in bf16.

For kernels of 5x5 and 7x7 the weight gradient takes 1/2 to 1/6 of the time of PyTorch's in fp32, and 1/4 to 1/30 in
bf16; with a stride the gradient of the input is computed in fp32, which takes 1/2 to 1/9 of the time of bf16 (torch
2.14, AMD EPYC with AVX-512).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE_KERNEL = 5
"""Side of the smallest kernels whose weight gradient is slow."""


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with the parameters of another one; its weight gradient is a depthwise convolution too.

    The gradient of the weight at (i, j) of a channel is the sum over lesions and positions of x shifted by (i, j) times
    the gradient of the output: the convolution of x by that gradient as a kernel, for each lesion and channel.
    """

    def __init__(self, replaced: nn.Conv2d) -> None:
        super().__init__(
            replaced.in_channels, replaced.out_channels, cast("Any", replaced.kernel_size),
            stride=cast("Any", replaced.stride), padding=cast("Any", replaced.padding), groups=replaced.groups,
            bias=replaced.bias is not None, device="meta",
        )  # fmt: skip
        self.weight, self.bias = replaced.weight, replaced.bias
        # timm's Conv2dSame pads as TensorFlow: depending on the input's size, and more at the end.
        self.same = type(replaced).__name__ == "Conv2dSame"
        self.train(replaced.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.weight.requires_grad or not torch.is_grad_enabled():
            return self._conv_forward(self._padded(x), self.weight, self.bias)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return cast("Tensor", _Depthwise.apply(self._padded(x), weight, bias, self.stride, self._padding))

    @property
    def _padding(self) -> tuple[int, ...]:
        return (0, 0) if self.same else cast("tuple[int, ...]", self.padding)

    def _padded(self, x: Tensor) -> Tensor:
        if not self.same:
            return x
        sides = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return F.pad(x, sides) if any(sides) else x

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self._padding, 1, self.groups)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        bf16, strided = x.dtype == torch.bfloat16, ctx.stride != (1, 1)

        def native(dtype: torch.dtype, number: int) -> Tensor:
            inputs = (tensor.to(dtype) for tensor in (gradient, x, weight))
            settings = (None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], len(weight))
            wanted = [number == 0, number == 1, False]
            return torch.ops.aten.convolution_backward(*inputs, *settings, wanted)[number].to(x.dtype)

        if ctx.needs_input_grad[0]:
            of_x = native(torch.float32 if strided else x.dtype, 0)
        if ctx.needs_input_grad[1]:
            # PyTorch's gradient is faster with a stride in fp32, and with small kernels in any precision.
            ours = min(weight.shape[2:]) >= LARGE_KERNEL and (bf16 or not strided)
            of_weight = _weight_gradient(gradient, x, weight, ctx.stride, ctx.padding) if ours else native(x.dtype, 1)
        return of_x, of_weight, gradient.sum((0, 2, 3)) if ctx.has_bias else None, None, None


def _weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    lesions, channels = x.shape[:2]
    height, width = weight.shape[2:]
    images = x.reshape(1, lesions * channels, *x.shape[2:])
    kernels = gradient.reshape(lesions * channels, 1, *gradient.shape[2:])
    products = F.conv2d(images, kernels, None, 1, padding, stride, lesions * channels)
    return products[..., :height, :width].reshape(lesions, *weight.shape).sum(0)


def use_fast_depthwise(network: nn.Module) -> None:
    """Replace the depthwise convolutions of a network that `DepthwiseConv2d` speeds up on CPUs, in place.

    Keeps parameters and their names.
    """
    for name, module in [*network.named_modules()]:
        if _is_slow(module):
            network.set_submodule(name, DepthwiseConv2d(cast("nn.Conv2d", module)))


def _is_slow(module: nn.Module) -> bool:
    # By name, since importing timm takes seconds. Not subclasses, which may compute something else.
    if type(module) is not nn.Conv2d and type(module).__name__ != "Conv2dSame":
        return False
    assert isinstance(module, nn.Conv2d)
    return (
        module.groups == module.in_channels == module.out_channels > 1
        and (min(module.kernel_size) >= LARGE_KERNEL or max(module.stride) > 1)
        and set(module.dilation) == {1}
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.requires_grad
    )
