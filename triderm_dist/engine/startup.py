"""What a run says before its first step."""

from __future__ import annotations

from accelerate import Accelerator

from triderm_dist.config import TrainConfig
from triderm_dist.engine.parallel import choose_precision, split_batch
from triderm_dist.models.network import Network


def describe(accelerator: Accelerator, config: TrainConfig, network: Network) -> str:
    """One line for people: how this run is spread, its precision and why, batch and parameters."""
    precision, why = choose_precision(config.precision, accelerator.device)
    accumulation = split_batch(config.global_batch, config.micro_batch, accelerator.num_processes)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    held = sum(p.numel() for p in network.parameters())
    return (
        f"{accelerator.distributed_type.value} on {accelerator.device}, {accelerator.num_processes} rank(s); "
        f"{precision} ({why}); global batch {config.global_batch} = {accelerator.num_processes} x {config.micro_batch} "
        f"x {accumulation}; {trained / 1e6:.2f} of {held / 1e6:.2f} million parameters are trained"
    )
