"""Rank 0 of two over NCCL on a stub of a GPU, where the other rank runs but stops answering (NULLGPU_HANG).

python nccl_worker.py BEGUN: 1 if the collectives before count as progress. The other rank is a thread that sets its
heartbeat.
"""

import os
import threading
import time
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from triderm_dist.cli import run_words
from triderm_dist.distributed import heartbeat
from triderm_dist.distributed.collectives import interrupt_on_lost_rank

TIMEOUT = 4.0
heartbeat.LEAVE_SECONDS = 2.0


def beat() -> None:
    store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store())
    for number in count():
        store.set("beat 1", str(number))
        time.sleep(0.5)


@interrupt_on_lost_rank()
def main(words: list[str]) -> None:
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # as `parallel.start` sets it
    torch.cuda.set_device(0)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=2, timeout=timeout)
    heartbeat.start_heartbeat(TIMEOUT)
    threading.Thread(target=beat, daemon=True).start()
    numbers = torch.ones(4, device="cuda")
    dist.all_reduce(numbers)
    numbers.sum().item()
    if words == ["1"]:
        heartbeat.note_progress()
    for _ in range(5):
        dist.all_reduce(numbers)
    numbers.sum().item()  # waits for the device, forever


if __name__ == "__main__":
    run_words(main, None)
