"""launch.train where training more than 4 lesions at once runs out of memory on one rank, the first argument."""

import os
import sys

import torch

from triderm_dist.cli import run
from triderm_dist.commands.train import TrainRun, main
from triderm_dist.models.network import Network

ROOM_FOR = 4


def allocate(module: torch.nn.Module, inputs: tuple) -> None:
    if isinstance(module, Network) and module.training and len(inputs[0]) > ROOM_FOR:
        raise torch.OutOfMemoryError(f"out of memory: no room for {len(inputs[0])} lesions")


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == sys.argv[1]:
        torch.nn.modules.module.register_module_forward_pre_hook(allocate)
    run(TrainRun, main, None, sys.argv[2:])
