"""Run launch.train, and send it a signal before the COUNTth training forward of the network.

A checkpoint that a thread is writing then is finished first, so that the same one exists on a busy machine.

python signal_worker.py SIGNAL COUNT [SETTINGS OF launch.train]
"""

import os
import signal
import sys
import threading
from itertools import count

import torch

from triderm_dist.cli import run
from triderm_dist.commands.train import TrainRun, main
from triderm_dist.engine.background_writer import WRITER
from triderm_dist.models.network import Network

if __name__ == "__main__":
    number, last, *arguments = sys.argv[1:]
    calls = count(1)

    def hook(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, Network) and module.training and next(calls) == int(last):
            for thread in threading.enumerate():
                if thread.name == WRITER:
                    thread.join()
            os.kill(os.getpid(), signal.Signals[number])

    torch.nn.modules.module.register_module_forward_pre_hook(hook)
    run(TrainRun, main, None, arguments)
