"""Estimate what a training needs on a GPU: memory, throughput, and CPU cores to decode its photos."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from triderm_dist.config import TrainConfig
from triderm_dist.distributed.parallel import Strategy
from triderm_dist.models.network import Network
from triderm_dist.monitoring.flops import TrainingCompute
from triderm_dist.monitoring.memory_estimate import MemoryEstimate
from triderm_dist.monitoring.throughput import GIB

MFU, MFU_OF_CONVOLUTIONS = 0.3, 0.02
"""Assumed MFU (model FLOP/s utilization) of a GPU that does not wait for data: for most networks, and for networks of
mostly convolutions. An H200 reached 0.32 with the base network, compiled and as a CUDA graph, and the kernels of the
dual CNN 0.019 without either (docs/benchmarks.md). triderm bench measures it.
"""
PIXELS_PER_SECOND = 3750 * 384 * 288
"""Pixels that a core decodes per second: measured on photos of 384x288, see docs/benchmarks.md."""


@dataclass(frozen=True)
class Expectation:
    """Estimated need of a training.

    memory: GiB of tensors per GPU.  lesions_per_s: on all GPUs, at an assumed `mfu`.
    cores: to decode the photos of these lesions; 0 if the training reads a cache.
    """

    memory: float
    lesions_per_s: float
    mfu: float
    cores: float

    def __str__(self) -> str:
        decoding = f", whose photos take {self.cores:.1f} cores to decode" if self.cores else ""
        rate = f"{self.lesions_per_s:,.0f} lesions/s at an assumed MFU of {self.mfu:.0%}"
        return f"{self.memory:.1f} GiB and {rate}{decoding}"

    def compare(self, memory: float, lesions_per_s: float) -> str:
        """Compare with the measured peak memory in GiB and throughput, in one line."""
        shares = memory / self.memory, lesions_per_s / self.lesions_per_s
        return (
            f"{memory:.1f} GiB ({shares[0]:.0%} of what was expected) and {lesions_per_s:,.0f} lesions/s "
            f"({shares[1]:.0%} of what was expected)"
        )


def expect(
    network: Network,
    config: TrainConfig,
    compute: TrainingCompute,
    half: bool,
    strategy: Strategy = "single",
    canvas: tuple[int, int] | None = None,
) -> Expectation:
    """Estimate the need of a training on the devices of `compute`. Takes some seconds.

    network: before it is wrapped.  half: under autocast to 16 bits.  canvas: width and height of the photos in the
    shards.
    """
    memory = MemoryEstimate(network, config, half, compute.devices, strategy, canvas).total(config.micro_batch)
    mfu = assumed_mfu(network)
    rate = mfu * compute.peak * compute.devices / compute.flops
    reads_photos = canvas and network.holds_towers
    pixels = len(network.signature.views) * math.prod(canvas) if canvas and reads_photos else 0
    return Expectation(memory / GIB, rate, mfu, rate * pixels / PIXELS_PER_SECOND)


def assumed_mfu(network: nn.Module) -> float:
    """Return the assumed MFU of a network."""
    in_convolutions = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d))
    mostly = in_convolutions > 0.5 * sum(parameter.numel() for parameter in network.parameters())
    return MFU_OF_CONVOLUTIONS if mostly else MFU
