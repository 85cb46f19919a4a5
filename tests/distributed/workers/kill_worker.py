"""Run trainings in sequence, each in a fork of this process (which has imported everything), and kill some of them.

A job is {"config": FILE, "settings": [...], "kill": null or [EVENT, COUNT]}: SIGKILL at the COUNTth event of a kind:

- "forward": the network is about to run, in training or validation;
- "write": a file of a checkpoint is opened for writing;
- "rename": a checkpoint, or a file in it, is about to be renamed to its final name;
- "replace": any other file is about to be renamed, such as weights, or metrics.jsonl at the start.

Prints a JSON list of the exit codes: 0, or the negative signal number.
"""

import json
import os
import signal
import sys

import simplejpeg  # noqa: F401 - else every fork imports it again
import timm  # noqa: F401
import torch
import torch.utils.tensorboard

from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine import trainer  # noqa: F401
from triderm_dist.engine.crossval import run_folds
from triderm_dist.models.network import Network


def kill_at(event: str, count: int) -> None:
    """Kill this process at the `count`th event, by an audit hook on every file that Python opens or renames."""
    remaining = count

    def on_event() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, arguments: tuple) -> None:
        if name == "open" and event == "write" and ".part/" in str(arguments[0]) and arguments[1] != "r":
            on_event()
        elif name == "os.rename":
            source = str(arguments[0])
            if event == ("rename" if "/checkpoints/" in source else "replace"):
                on_event()

    if event == "forward":
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: on_event() if isinstance(module, Network) else None
        )
    else:
        sys.addaudithook(hook)


def train(job: dict) -> None:
    if job.get("kill"):
        kill_at(*job["kill"])
    experiment = load(Experiment, job["config"], job["settings"])
    run_folds(experiment, read_index(experiment.train_shards), list(experiment.models), [0])


def main(jobs: str) -> None:
    codes = []
    for job in json.loads(jobs):
        child = os.fork()
        if child == 0:
            train(job)
            sys.stdout.flush()
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print("\n" + json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
