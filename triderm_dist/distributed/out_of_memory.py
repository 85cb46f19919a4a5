"""Out of memory: resume from the last checkpoint with half the micro-batch, twice the accumulation steps and the same
global batch.

The rank that runs out of memory writes the smaller micro-batch to FOLDER/micro_batch.json, which later resumes also
read. A single process then builds everything again. With several, the other ranks may wait in a collective that never
completes, and the state of DDP, FSDP2 and DeepSpeed is broken, so every rank needs a new process: each polls the file
and replaces itself by exec (the launcher sees the same process), within `POLL_SECONDS`.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, PositiveInt

from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.config import TrainConfig
from triderm_dist.distributed.collectives import on_main, world_size
from triderm_dist.distributed.library_errors import is_out_of_memory
from triderm_dist.distributed.parallel import ATTEMPT
from triderm_dist.files import write_json
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import ConfigError

POLL_SECONDS = 1.0
"""Seconds between two reads of the file."""


@dataclass
class Attempt:
    """An attempt to train. failed: it ran out of memory, and a smaller micro-batch size was written."""

    failed: bool = False


class _MicroBatchKeys(BaseModel):
    micro_batch: PositiveInt
    identity: str


class MicroBatch:
    """The micro-batch size of one training: the configured one, or a smaller one that fits into memory."""

    def __init__(self, folder: Path, result_hash: str, config: TrainConfig) -> None:
        """result_hash: of the training; a file of another training is ignored."""
        self.path, self.result_hash, self.config = folder / "micro_batch.json", result_hash, config

    def size(self) -> int:
        """Return the size in the file, read by this rank; the configured one if it cannot be read."""
        try:
            record = read_checked_json(self.path, _MicroBatchKeys)
        except (OSError, DamagedFile):  # also of a network disk, such as ESTALE: the watching thread must not end
            return self.config.micro_batch
        return int(record["micro_batch"]) if record["identity"] == self.result_hash else self.config.micro_batch

    def agreed(self) -> int:
        """Return the size in the file, read by rank 0. Call on all ranks."""
        return on_main(self.size)

    @contextmanager
    def fits(self, size: int) -> Iterator[Attempt]:
        """Run an attempt with micro-batches of `size` in the block.

        If it runs out of memory, a smaller size is written, and the attempt ends as failed (one process) or this
        process is restarted (several). Raises ConfigError if a single lesion does not fit, or is too few for a batch
        norm.
        """
        done, attempt = threading.Event(), Attempt()
        if world_size() > 1:
            threading.Thread(target=self._watch, args=(size, done), daemon=True).start()
        try:
            yield attempt
        except ValueError as error:
            if _ONE_VALUE not in str(error):
                raise
            raise ConfigError(
                f"train.micro_batch: with {size} a trained batch norm has one value per channel, and nothing to "
                "normalize; raise it or tower.image_size, or freeze these blocks"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                if self.size() < size:  # another rank ran out of memory and has left the collective
                    restart()
                raise
            smaller = next_smaller(size, self.config.global_batch // world_size(), self.config.smallest_micro_batch)
            write_json(self.path, {"micro_batch": smaller, "identity": self.result_hash})
            print(wrapped(f"{_message(size, smaller)} ({one_line(error, 200)})"), flush=True)
            if world_size() > 1:
                restart()
            attempt.failed = True
        finally:
            done.set()

    def _watch(self, size: int, done: threading.Event) -> None:
        while not done.wait(POLL_SECONDS):
            if (smaller := self.size()) < size:
                print(wrapped(_message(size, smaller)), flush=True)
                restart()


_ONE_VALUE = "more than 1 value per channel"
"""Part of PyTorch's message for batch norms in training."""
T = TypeVar("T")


def with_smaller_batches(work: Callable[[int], T], batch: int, setting: str, collective: bool = True) -> tuple[T, int]:
    """Call `work` with a batch size, halved as often as memory runs out; return its result and the size that fits.

    For inference, where results differ only by rounding.
    setting: key of the batch size, for messages.  collective: whether `work` calls collectives.
    Raises ConfigError if a batch of 1 does not fit, or if other ranks wait for this one in a collective.
    """
    while True:
        try:
            return work(batch), batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error, 200)
        gc.collect()  # frees the tensors of the attempt, after its traceback
        torch.cuda.empty_cache()
        if batch == 1:
            raise ConfigError(f"out of memory with a single lesion ({reason}); free the device, or use another one")
        if world_size() > 1 and collective:
            raise ConfigError(f"out of memory with {setting}={batch} ({reason}); set {setting}={batch // 2}")
        batch //= 2
        print(wrapped(f"out of memory: continuing with {setting}={batch} ({reason})"), flush=True)


def next_smaller(size: int, per_rank: int, smallest: int = 1) -> int:
    """Return the largest micro-batch of at most size / 2 that divides the global batch per rank, a multiple of
    `smallest`.

    Raises ConfigError if there is none.
    """
    smaller = next((n for n in range(size // 2, 0, -1) if per_rank % n == 0 and n % smallest == 0), 0)
    if not smaller:
        raise ConfigError(
            f"out of memory with a micro-batch of {size}: rerun with train.activation_checkpointing=true or with "
            "accelerate_configs/fsdp2.yaml to resume from the last checkpoint, or freeze more blocks, which starts "
            "from the beginning"
        )
    return smaller


SUPERVISED = "TRIDERM_SUPERVISED"
"""Set if a supervisor, such as Ray, restarts all ranks as soon as one of them ends."""
_restarting = threading.Lock()


def restart() -> None:
    """Replace this process by a new one with the same command, or exit if it is supervised. Does not return."""
    if SUPERVISED in os.environ:
        os._exit(1)
    _restarting.acquire()  # never released: the polling thread may call this too, and an attempt must count once
    os.environ[ATTEMPT] = str(int(os.environ.get(ATTEMPT, "0")) + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(2 * POLL_SECONDS)  # until all ranks have read the file, so that none joins the old group
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _message(size: int, smaller: int) -> str:
    return (
        f"out of memory: resuming from the last checkpoint with micro-batch {smaller} instead of {size} and "
        f"{size // smaller} times the accumulation steps; the global batch is unchanged. Several micro-batches a step "
        "need a first forward pass for the soft F1 loss, which a new run saves by train.loss.soft_f1_sums=previous"
    )
