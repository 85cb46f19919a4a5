"""Ranks that read an epoch plan through the loader and log the lesions; optionally killed and resumed repeatedly.

python order_worker.py SHARDS FOLDER '[[WORLD, ...], KILLS]'

Runs EPOCHS epochs. The list has the world size of each attempt; the last one holds for all further attempts. The first
KILLS attempts are ended by SIGKILL at a random moment and resumed from FOLDER/consumed, the number of completed steps,
which is the only state. FOLDER/ATTEMPT-WORLD-RANK.txt has one line per step: its number and the lesions. Ranks are
forked, since importing PyTorch twenty times would take a minute.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from triderm_dist.config import RemoteConfig
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import open_index
from triderm_dist.files import write_text

GLOBAL_BATCH, EPOCHS = 8, 5
SAMPLING = Sampling("balanced", window=40)


def plans(index: ShardIndex) -> list[EpochPlan]:
    samples = Samples(np.arange(len(index)), index.labels, index.shard)
    return [EpochPlan(samples, SAMPLING, seed=3, epoch=epoch) for epoch in range(EPOCHS)]


def read(rank: int, world: int, shards: str, folder: Path, attempt: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{attempt}", rank=rank, world_size=world)
    index = open_index(shards, RemoteConfig(cache=str(folder / "cache"), total_seconds=600))
    source = PhotoSource(index, 24, (0.5,) * 3, (0.5,) * 3)
    consumed = int((folder / "consumed").read_text())
    passed = 0
    with (folder / f"{attempt}-{world}-{rank}.txt").open("w") as log:
        for plan in plans(index):
            steps = plan.num_batches(GLOBAL_BATCH)
            batches = plan.batches(rank, world, GLOBAL_BATCH, start=min(max(consumed - passed, 0), steps))
            for step in Loader(index, source, batches, micro_batch=2, device=torch.device("cpu"), prefetch=3):
                parts = [zip(batch.lesion_ids, batch.valid, strict=True) for batch in step.micro_batches]
                lesions = [name for part in parts for name, valid in part if valid]
                print(passed + step.number, *lesions, file=log, flush=True)
                dist.all_reduce(torch.ones(1))  # as the gradients of a training step
                if rank == 0:
                    write_text(folder / "consumed", str(passed + step.number + 1))
                dist.barrier()
            passed += steps


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(shards: str, folder: Path, worlds: list[int], kills: int) -> None:
    moment = random.Random(5)
    write_text(folder / "consumed", "0")
    for attempt in range(kills + 1):
        world = worlds[min(attempt, len(worlds) - 1)]
        began = int((folder / "consumed").read_text())
        ranks = []
        for rank in range(world):
            if (pid := os.fork()) == 0:
                try:
                    read(rank, world, shards, folder, attempt)
                    os._exit(0)
                except BaseException as error:
                    print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
                    os._exit(1)
            ranks.append(pid)
        if attempt < kills:
            wanted = began + moment.randrange(5)
            while int((folder / "consumed").read_text()) < wanted and not has_ended(ranks[0]):
                time.sleep(0.001)
            time.sleep(moment.uniform(0, 0.02) if wanted > began else moment.uniform(0, 0.4))
            for pid in moment.sample(ranks, world):
                os.kill(pid, signal.SIGKILL)
        status = [os.waitpid(pid, 0)[1] for pid in ranks]
        if attempt == kills and any(status):
            sys.exit(f"attempt {attempt}: ranks ended with {status}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *json.loads(sys.argv[3]))
