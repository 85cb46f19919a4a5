"""launch.train that runs out of memory on one rank (the first argument) with micro-batches above 4 lesions."""

import os
import sys

import torch

from triderm_dist.cli import run
from triderm_dist.commands.train import TrainRun, main
from triderm_dist.models.network import Network

CAPACITY = 4


def limit_memory(module: torch.nn.Module, inputs: tuple) -> None:
    if isinstance(module, Network) and module.training and len(inputs[0]) > CAPACITY:
        raise torch.OutOfMemoryError(f"out of memory with {len(inputs[0])} lesions")


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == sys.argv[1]:
        torch.nn.modules.module.register_module_forward_pre_hook(limit_memory)
    run(TrainRun, main, None, sys.argv[2:])
