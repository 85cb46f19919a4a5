"""Out of memory: half the micro-batch, twice the accumulation, the same global batch, and on from the last checkpoint.

The rank that runs out writes the smaller micro-batch to FOLDER/micro_batch.json, where a later resume finds it too. One
process then simply builds everything again. With several, the others may already wait for it in a collective that will
never come, and DDP, FSDP2 and DeepSpeed each leave a state behind that nothing repairs: the only clean slate is a new
process. So every rank watches the file and starts its own program anew in place (the launcher sees the same process,
and the memory is free), at most `PATIENCE` after the first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from triderm_dist.distributed.collectives import on_main, world_size
from triderm_dist.distributed.parallel import ATTEMPT
from triderm_dist.files import write_json
from triderm_dist.schema import ConfigError

PATIENCE = 1.0
"""Seconds between two looks at the file."""


@dataclass
class Attempt:
    """Whether it ran out of memory, and a smaller micro-batch is on file."""

    failed: bool = False


class MicroBatch:
    """The micro-batch of one training: that of the settings, or a smaller one that fits into memory."""

    def __init__(self, folder: Path, identity: str, wanted: int, global_batch: int) -> None:
        self.path, self.identity = folder / "micro_batch.json", identity
        self.wanted, self.global_batch = wanted, global_batch

    def size(self) -> int:
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return self.wanted
        return record["micro_batch"] if record["identity"] == self.identity else self.wanted

    def agreed(self) -> int:
        """The size as rank 0 sees it; call on all ranks."""
        return on_main(self.size)

    @contextmanager
    def fits(self, size: int) -> Iterator[Attempt]:
        """Where the block runs out of memory, write a smaller size and end the attempt as failed, or start this process
        anew if it has others beside it. Raises ConfigError where one lesion is too much.
        """
        done, attempt = threading.Event(), Attempt()
        if world_size() > 1:
            threading.Thread(target=self._watch, args=(size, done), daemon=True).start()
        try:
            yield attempt
        except RuntimeError as error:
            if not is_out_of_memory(error):
                if self.size() < size:  # another rank ran out, and its end of a collective is gone
                    restart()
                raise
            smaller = next_smaller(size, self.global_batch // world_size())
            write_json(self.path, {"micro_batch": smaller, "identity": self.identity})
            print(f"{_said(size, smaller)} ({str(error).splitlines()[0]})", flush=True)
            if world_size() > 1:
                restart()
            attempt.failed = True
        finally:
            done.set()

    def _watch(self, size: int, done: threading.Event) -> None:
        while not done.wait(PATIENCE):
            if (smaller := self.size()) < size:
                print(_said(size, smaller), flush=True)
                restart()


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of the host, which PyTorch reports as a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def next_smaller(size: int, of_rank: int) -> int:
    """The largest micro-batch of at most half the size that divides a rank's part of the global batch."""
    smaller = next((n for n in range(size // 2, 0, -1) if of_rank % n == 0), 0)
    if not smaller:
        raise ConfigError(
            "out of memory with one lesion at a time: the same command goes on from the last checkpoint with "
            "train.activation_checkpointing=true or under accelerate_configs/fsdp2.yaml; freezing more blocks trains "
            "from the beginning"
        )
    return smaller


KEEPER = "TRIDERM_KEEPER"
"""Set where a keeper, such as Ray, starts all ranks anew as soon as one of them ends."""
_restarting = threading.Lock()


def restart() -> None:
    """Replace this process by a new one with the same command, or leave that to its keeper. Does not return."""
    if KEEPER in os.environ:
        os._exit(1)
    _restarting.acquire()  # for good: the watching thread comes here too, and an attempt must count once
    os.environ[ATTEMPT] = str(int(os.environ.get(ATTEMPT, "0")) + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(2 * PATIENCE)  # until all ranks have seen the file, so that none meets an old group
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _said(size: int, smaller: int) -> str:
    return (
        f"out of memory: micro-batch {smaller} instead of {size}, accumulation {size // smaller} times as long, "
        "the same global batch; on from the last checkpoint"
    )
