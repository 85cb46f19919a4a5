"""One of two ranks that all-reduce over gloo, until rank 1 does what the first argument says, at step 3.

python lost_rank_worker.py FATE BEGUN TIMEOUT

FATE: kill, stop (SIGSTOP), hang, refuse (InputError), fail (a bug), none, or device: rank 1 is killed while the main
thread of rank 0 waits as it does for a device. BEGUN: 1 if steps count as progress. TIMEOUT: rank_timeout in seconds.
"""

import os
import signal
import time
from itertools import count

import torch

from triderm_dist.cli import run_words
from triderm_dist.distributed import heartbeat, parallel
from triderm_dist.distributed.collectives import all_reduce_sum, interrupt_on_lost_rank, rank
from triderm_dist.schema import InputError

heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS, heartbeat.LEAVE_SECONDS = 0.2, 4.0, 2.0


@interrupt_on_lost_rank()
def main(words: list[str]) -> None:
    fate, begun, timeout = words
    parallel.start_inference("fp32", float(timeout))
    for step in count():
        all_reduce_sum(torch.ones(1))
        if begun == "1":
            heartbeat.note_progress()
        if step == 3 and rank() == 1:
            meet(fate)
        if step == 3 and fate == "device":
            time.sleep(1000)


def meet(fate: str) -> None:
    if fate in ("kill", "device", "stop"):
        os.kill(os.getpid(), signal.SIGSTOP if fate == "stop" else signal.SIGKILL)
    elif fate == "hang":
        time.sleep(1000)
    elif fate == "refuse":
        raise InputError("a file of rank 1 is damaged")
    elif fate == "fail":
        raise ZeroDivisionError


if __name__ == "__main__":
    run_words(main, None)
