"""Exit codes of two ranks over gloo where one is killed, hangs or fails, or where they never reach one another.

The ranks run without a launcher, as those of two hosts: one that ends does not make the other end.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist

from tests.processes import HANG_SECONDS, ROOT, WORKERS, finish, start
from triderm_dist.cli import Interrupted
from triderm_dist.distributed import heartbeat, parallel
from triderm_dist.distributed.collectives import interrupt_on_lost_rank
from triderm_dist.distributed.library_errors import is_backend_error, permanent_fault
from triderm_dist.schema import InputError

NULL_GPU = ROOT.parent / "shared" / "nullgpu" / "nullgpu"
TIMEOUT = 6
"""Seconds of rank_timeout."""


@dataclass(frozen=True)
class Case:
    """FATE and BEGUN of lost_rank_worker.py, and the exit codes and last lines of both ranks; None: not asked."""

    fate: str
    begun: int
    statuses: tuple[int | None, int | None]
    says: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


CASES = {
    "killed": Case("kill", 1, (3, -signal.SIGKILL), ("interrupted: rank 0 lost contact", "rerun the same command")),
    "killed before the first step": Case("kill", 0, (3, -signal.SIGKILL), ("interrupted:", "rank 1 is gone")),
    "stopped": Case("stop", 1, (3, None), ("interrupted: rank 0 lost contact",)),
    "killed while the other waits for a device": Case("device", 1, (3, -signal.SIGKILL), ("rank 1 is gone",)),
    "hung": Case("hang", 1, (3, 3), ("interrupted: rank 0 lost contact",)),
    "hung before the first step": Case("hang", 0, (2, 2), ("error: rank 0 lost contact", "-m doctor")),
    "refused": Case("refuse", 1, (2, 2), ("error: rank 0 ends because rank 1 failed: a file of rank 1 is damaged",)),
    "a bug": Case("fail", 1, (2, 1), ("error: rank 0 ends because rank 1 failed: ZeroDivisionError",)),
    "no such interface": Case(
        "none", 0, (2, 2), ("error: rank 0: no such network interface", "GLOO_SOCKET_IFNAME", "-m doctor"),
        {"GLOO_SOCKET_IFNAME": "absent0"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def started() -> dict[str, list[subprocess.Popen]]:
    """The two ranks of every case, all at once: they wait most of the time."""
    return {
        name: [start_rank(case, rank, port) for rank in (0, 1)] for name, case in CASES.items() for port in [free()]
    }


def free() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start_rank(case: Case, rank: int, port: int) -> subprocess.Popen:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return start(
        str(WORKERS / "lost_rank_worker.py"), case.fate, str(case.begun), str(TIMEOUT),
        environment={**{name: str(value) for name, value in variables.items()}, **case.environment},
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_end_with_the_exit_code_of_the_fault(started, name):
    case, (first, second) = CASES[name], started[name]
    done = finish(first)
    if case.statuses[1] is None:
        os.killpg(second.pid, signal.SIGKILL)  # it is stopped
    other = finish(second)
    assert done.returncode == case.statuses[0], done.stderr + other.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "interrupted: "))]
    assert len(lines) == 1 and all(words in lines[0] for words in case.says), done.stderr
    assert "Traceback" not in done.stderr
    assert case.statuses[1] in (None, other.returncode), other.stderr
    assert (done.stderr + other.stderr).count("sendBytes failed") <= 2  # PyTorch's, where the store's host has ended


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "status", "says"), [("1", 3, "interrupted: "), ("0", 2, "error: ")])
def test_rank_that_waits_for_the_device_ends_where_nccl_gets_no_answer(begun, status, says):
    if not NULL_GPU.exists():
        pytest.skip("needs shared/nullgpu beside the project")
    words = [str(NULL_GPU), sys.executable, str(WORKERS / "nccl_worker.py"), begun]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NULLGPU_HANG": "3", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == status, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "interrupted: "))]
    assert line.startswith(f"{says}rank 0 lost contact with another rank (NCCL: no answer in time)")


NCCL = "NCCL error in: NCCLUtils.cpp:77, {}, NCCL version 2.29.7\n{}\nLast error:\n{}"


@pytest.mark.parametrize(
    ("text", "means", "advice"),
    [
        (
            NCCL.format(
                "invalid usage (run with NCCL_DEBUG=WARN for details)",
                "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
                "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 53000",
            ),
            "two ranks use one GPU (Duplicate GPU detected : rank 1 and rank 0",
            "--num_processes",
        ),
        (
            NCCL.format(
                "unhandled cuda error",
                "ncclUnhandledCudaError: Call to CUDA function failed.",
                "Cuda failure 2 'out of memory'",
            ),
            "out of memory while the ranks connect (Cuda failure 2",
            "nvidia-smi",
        ),
        (
            NCCL.format(
                "unhandled system error",
                "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.",
                "Error while creating shared memory segment /dev/shm/nccl-Ue5mkZ (size 9637888), error: No space left",
            ),
            "/dev/shm is missing or too small",
            "--shm-size",
        ),
        (
            NCCL.format(
                "internal error", "ncclInternalError: Internal check failed.", "Bootstrap : no socket interface"
            ),
            "no such network interface",
            "NCCL_SOCKET_IFNAME",
        ),
    ],
)
def test_faults_of_nccl_that_stay_end_with_exit_code_2(text, means, advice):
    with pytest.raises(InputError) as refused, interrupt_on_lost_rank():
        raise dist.DistBackendError(text)
    assert means in str(refused.value) and advice in str(refused.value) and "-m doctor" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1234"),
        dist.DistBackendError(
            NCCL.format("remote process exited or there was a network error", "ncclRemoteError", "x")
        ),
        dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0"),
    ],
)
def test_errors_that_a_lost_rank_causes_are_not_permanent(error):
    assert is_backend_error(error) and not permanent_fault(error)


def test_other_errors_pass():
    for error in (RuntimeError("size mismatch"), ZeroDivisionError(), Interrupted("saved"), InputError("a setting")):
        with pytest.raises(type(error)) as raised, interrupt_on_lost_rank():
            raise error
        assert raised.value is error and not is_backend_error(error)


def test_smallest_loss_scale_of_deepspeed_is_refused_with_advice():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=1.0, scale_window=10, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False
    )
    with pytest.raises(InputError, match="precision=bf16"), parallel.naming_smallest_scale():
        scaler.update_scale(overflow=True)
    with pytest.raises(ValueError, match="another"), parallel.naming_smallest_scale():
        raise ValueError("another")


def test_stopping_the_heartbeat_waits_for_its_thread(monkeypatch):
    """A thread in a request at the end of the interpreter would abort the process, after a training that succeeded."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.0)
    asked = threading.Event()

    def device_error() -> str:
        asked.set()
        beat._stopped.wait()
        time.sleep(0.3)
        return ""

    beat = heartbeat.Heartbeat(dist.HashStore(), 0, 1, 60.0, device_error)
    beat.start()
    asked.wait()
    beat.stop()
    assert not beat._thread.is_alive()
