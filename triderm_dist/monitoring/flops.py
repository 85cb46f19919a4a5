"""How much a lesion costs to train, and how much devices could do: the two sides of MFU (model FLOP/s utilisation)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from triderm_dist.models.network import Network
from triderm_dist.models.towers import Tower
from triderm_dist.schema import METADATA_FIELDS, VIEWS

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
"""Dense bf16 peak (fp16 where there is no bf16) in FLOP/s with fp32 sums, from NVIDIA's data sheets, by a pattern of
the device's whole name. A laptop's, a cut-down or a partitioned (MIG) device is none of these."""


@dataclass(frozen=True)
class Budget:
    """FLOPs that a lesion takes in training, the FLOP/s that one device could do, and how many devices there are."""

    flops: float
    peak: float
    devices: int
    source: str

    def mfu(self, lesions_per_s: float) -> float:
        """The share of the devices' peak that goes into the network."""
        return lesions_per_s * self.flops / (self.peak * self.devices)

    def __str__(self) -> str:
        return f"{self.flops / 1e9:,.1f} GFLOP a lesion; MFU against {self.peak / 1e12:,.0f} TFLOP/s ({self.source})"


def budget(network: Network, device: torch.device, devices: int, peak_tflops: float | None = None) -> Budget | None:
    """The budget of a bare network on a kind of device, or None where no peak is known and none is given."""
    if peak_tflops is not None:
        return Budget(training_flops(network), peak_tflops * 1e12, devices, "as set")
    peak = peak_flops(device)
    return None if peak is None else Budget(training_flops(network), peak, devices, "dense half precision")


def peak_flops(device: torch.device) -> float | None:
    """Dense half-precision peak of a device in FLOP/s, or None where it is not known."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """`peak_flops` of a device by its name, such as "NVIDIA H100 80GB HBM3"."""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, name)), None)


def training_flops(network: Network) -> float:
    """FLOPs (a multiplication and an addition are two) of one lesion's forward and backward, as the network is trained.

    Counted, not estimated: one real forward and backward over fake tensors, which have shapes but no memory. So a
    frozen prefix counts its forward only, and nothing is computed. Attention counts in its written-out form, 4 products
    backward: what a fused kernel or activation checkpointing computes twice is not credited. Call it on the bare
    network, before wrapping, compiling or sharding.
    """
    lesions = 2
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    training = network.training
    network.train()
    # The written-out form is asked for, since PyTorch's formulas do not know every fused kernel.
    with FakeTensorMode() as mode, sdpa_kernel(SDPBackend.MATH), counter:
        tensors = [*network.named_parameters(), *network.named_buffers()]
        state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors}
        inputs = example_inputs(network, lesions)
        outputs = torch.func.functional_call(network, state, inputs)
        torch.stack([logits.float().sum() for logits in outputs[:3]]).sum().backward()
    network.train(training)
    return counter.get_total_flops() / lesions


def example_inputs(network: Network, lesions: int) -> tuple[Tensor, ...]:
    """What `network` takes for so many lesions, all zeros, on its device."""
    device = next(network.parameters()).device
    if network.holds_towers and network.towers:
        tower = next(iter(network.towers.values()))
        assert isinstance(tower, Tower)
        shape: tuple[int, ...] = (3, tower.image_size, tower.image_size)
    else:
        shape = tuple(network.token_shape)
    view = torch.zeros(lesions, *shape, device=device)
    present = torch.ones(lesions, len(VIEWS), dtype=torch.bool, device=device)
    concepts = torch.zeros(lesions, len(network.concept_names), device=device)
    return view, view, present, concepts, torch.zeros(lesions, len(METADATA_FIELDS), device=device)


def _convolution_backward_flops(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: list[bool], out_shape: Any,
) -> int:  # fmt: skip
    """Each of the two gradients costs what the forward does. PyTorch's own formula forgets the groups."""
    forward = 2 * math.prod(x if transposed else grad) * math.prod(weight[1:])
    return forward * (output_mask[0] + output_mask[1])
