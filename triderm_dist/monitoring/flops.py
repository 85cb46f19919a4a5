"""FLOPs per trained lesion and peak FLOP/s of devices, the two sides of MFU (model FLOP/s utilization)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from triderm_dist.models.network import Network
from triderm_dist.models.tower import Tower
from triderm_dist.schema import VIEWS

PEAKS: tuple[tuple[str, float], ...] = (
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA (GH200|H200).*", 989e12),
    (r"NVIDIA H100 NVL", 835e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H100 80GB HBM3", 989e12),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA A40", 150e12),
    (r"NVIDIA A10G", 70e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA L4", 121e12),
    (r"(Tesla|NVIDIA) V100.*", 125e12),
    (r"(Tesla|NVIDIA) T4", 65e12),
    (r"NVIDIA RTX 6000 Ada Generation", 364e12),
    (r"NVIDIA GeForce RTX 5090", 209e12),
    (r"NVIDIA GeForce RTX 4090", 165e12),
    (r"NVIDIA GeForce RTX 3090", 71e12),
)
"""Dense bf16 peak (fp16 if there is no bf16) in FLOP/s with fp32 sums, from NVIDIA's data sheets, by a pattern of
the full device name, so that laptop, cut-down and partitioned (MIG) devices do not match."""


@dataclass(frozen=True)
class TrainingCompute:
    """FLOPs of a training and the peak of its devices, the two sides of MFU.

    flops: per lesion in training.  peak: FLOP/s of one device.  source: of the peak, for messages.
    """

    flops: float
    peak: float
    devices: int
    source: str

    def mfu(self, lesions_per_s: float) -> float:
        """Return the share of the devices' peak at a throughput."""
        return lesions_per_s * self.flops / (self.peak * self.devices)

    def __str__(self) -> str:
        return f"{self.flops / 1e9:,.1f} GFLOP per lesion; MFU of {self.peak / 1e12:,.0f} TFLOP/s ({self.source})"


def training_compute(
    network: Network, device: torch.device, devices: int, peak_tflops: float | None = None
) -> TrainingCompute | None:
    """Return the compute of a bare network; None if the peak of the device is unknown and none is given."""
    if peak_tflops is not None:
        return TrainingCompute(training_flops(network), peak_tflops * 1e12, devices, "as set")
    peak = peak_flops(device)
    return None if peak is None else TrainingCompute(training_flops(network), peak, devices, "dense half precision")


def peak_flops(device: torch.device) -> float | None:
    """Return the dense half-precision peak of a device in FLOP/s, or None if it is unknown."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """Return `peak_flops` of a device by its name, such as "NVIDIA H100 80GB HBM3"."""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, name)), None)


def training_flops(network: Network, backward: bool = True) -> float:
    """Count the FLOPs of one lesion's forward and backward pass in training; a multiply-add is two.

    Runs one forward and backward pass on fake tensors, which have shapes but no memory; without `backward` only the
    forward pass. Frozen blocks count their forward pass only. Attention counts as unfused, with 4 matrix products in
    the backward pass: recomputation by a fused kernel or activation checkpointing is not credited. Call it on the bare
    network, before it is wrapped, compiled or sharded.
    """
    lesions = 2
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    training = network.training
    network.train()
    # Unfused attention, since PyTorch lacks formulas for some fused kernels.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), counter:
        tensors = [*network.named_parameters(), *network.named_buffers()]
        inputs = example_inputs(network, lesions, torch.device("cpu"))
        state = {name: empty_on_cpu(tensor) for name, tensor in tensors}
        outputs = torch.func.functional_call(network, state, inputs)
        if backward:
            torch.stack([logits.float().sum() for logits in outputs.heads]).sum().backward()
    network.train(training)
    return counter.get_total_flops() / lesions


def empty_on_cpu(tensor: Tensor) -> Tensor:
    """Return an empty tensor on the CPU with the same shape and dtype; a fake one in a `FakeTensorMode`."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def example_inputs(network: Network, lesions: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Return inputs of `network` for a number of lesions, all zeros. device: by default that of the network."""
    device = device or next(network.parameters()).device
    signature = network.signature

    def example(view: str) -> Tensor:
        if view not in signature.views:
            return torch.zeros(lesions, 0, device=device)
        towers = dict(network.towers.items())
        tower = towers.get(view) or next(iter(towers.values()), None)
        shape = tower.input_shape if network.holds_towers and isinstance(tower, Tower) else network.token_shape
        return torch.zeros(lesions, *shape, device=device)

    clinical, dermoscopic = (example(view) for view in VIEWS)
    present = torch.tensor([view in signature.views for view in VIEWS], device=device).repeat(lesions, 1)
    concepts, metadata = (
        torch.zeros(lesions, len(columns), device=device) for columns in (signature.concepts, signature.fields)
    )
    return clinical, dermoscopic, present, concepts, metadata


def _convolution_backward_flops(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: list[bool], out_shape: Any,
) -> int:  # fmt: skip
    """Count each of the two gradients like the forward pass. PyTorch's own formula ignores groups."""
    forward = 2 * math.prod(x if transposed else grad) * math.prod(weight[1:])
    return forward * (output_mask[0] + output_mask[1])
