"""Heartbeats of the ranks through the store of their process group, to detect ranks that were lost or have failed.

A thread of each rank writes a counter to the store every `BEAT_SECONDS`, reads the counter of the next rank (rank 0
after the last one), and reads notes of other ranks on lost or failed ranks; traffic is linear in the number of ranks.
The thread ends the process if the main thread cannot: after NCCL has lost a rank, it waits for the device forever.

Exit codes: 3 if a rank was lost, or for any failure after progress; 2 if a rank failed by its own error, or if all
ranks run without ever completing a step, which a restart would not change.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from triderm_dist.cli import Interrupted, print_error
from triderm_dist.distributed.library_errors import DOCTOR, permanent_fault, reason_of
from triderm_dist.runtime.signals import BAD_INPUT, INTERRUPTED
from triderm_dist.schema import InputError

BEAT_SECONDS = 2.0
SILENT_SECONDS = 12.0
"""A rank without a heartbeat for this time has probably died; `rank_timeout` decides."""
ANSWER_SECONDS = 12.0
"""Time for the store to answer a request."""
LEAVE_SECONDS = 20.0
"""Time for the main thread to end by itself after the heartbeat thread has found a lost rank."""
ENDED = b"ended"
STORE_HOST = "the host of the store, rank 0,"
RESUME = "when all hosts are back, rerun the same command to resume from the last checkpoint"

_current: Heartbeat | None = None
_progress = threading.Event()


def note_progress() -> None:
    """Record that all ranks completed a step, or another unit of work, since this process started."""
    _progress.set()


def current() -> Heartbeat | None:
    """Return the heartbeat of this process, if it has one."""
    return _current


def start_heartbeat(rank_timeout: float) -> None:
    """Start the heartbeat of this rank, once in a process; the process group exists."""
    global _current
    if _current is None and dist.is_initialized() and dist.get_world_size() > 1:
        store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store().clone())
        _current = Heartbeat(store, dist.get_rank(), dist.get_world_size(), rank_timeout)
        _current.start()
        atexit.register(_current.stop)


class Heartbeat:
    """The heartbeat of one rank."""

    def __init__(
        self, store: Any, rank: int, world: int, timeout: float, device_error: Callable[[], str] | None = None
    ) -> None:
        """store: a separate connection, for `_Store`.  timeout: see `rank_timeout`.
        device_error: returns the error that the device's backend reports, "" for none; default: that of NCCL.
        """
        self.store, self.rank, self.world, self.timeout = _Store(store), rank, world, timeout
        self._device_error = device_error or nccl_error
        self._stopped, self._has_read = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.store.set(f"beat {self.rank}", "0")
        self._thread.start()

    def stop(self) -> None:
        """Record that this rank has ended, so that no other waits for it.

        Rank 0, which may host the store, waits briefly for all ranks, since PyTorch prints a warning for each request
        to a store that no longer exists. Waits for the thread's request, within which the end of the interpreter would
        abort the process.
        """
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join(ANSWER_SECONDS)
            with suppress(RuntimeError):  # the store no longer exists
                self.store.set(f"beat {self.rank}", ENDED)
                self._await_all("ended", self.store.add("ended", 1), BEAT_SECONDS)

    def note_failure(self, status: int, line: str) -> None:
        """Record that this rank ends with this exit code; the first record of all ranks is kept.

        Rank 0 may host the store, and so waits until the others have read it, or for some heartbeats.
        """
        note = json.dumps({"rank": self.rank, "status": status, "line": line[:500]})
        with suppress(RuntimeError):
            self.store.compare_set("failed", "", note)
            self._await_all("read", self._note_read(), 2.5 * BEAT_SECONDS)

    def explain(self, error: BaseException) -> InputError | Interrupted:
        """Return the error to raise for a backend's error, given the state of the other ranks in the store."""
        if fault := permanent_fault(error):
            return InputError(f"rank {self.rank}: {fault}")
        deadline = time.monotonic() + SILENT_SECONDS + 2 * BEAT_SECONDS
        while True:
            try:
                failed, silent = self._failed(), self.store.get("silent")
            except RuntimeError:
                return self._lost(STORE_HOST, reason_of(error))
            if failed and failed["rank"] != self.rank:
                return self._after(failed)
            if silent is not None:
                return self._lost(f"rank {silent.decode()}", reason_of(error))
            if _progress.is_set() or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return self._stuck(reason_of(error))

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        neighbor, seen, number = (self.rank + 1) % self.world, None, 0
        changed = answered = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            number += 1
            try:
                self.store.set(f"beat {self.rank}", str(number))
                beat, failed, lost = self.store.get(f"beat {neighbor}"), self._failed(), self.store.get("lost")
                now = answered = time.monotonic()
                if beat != seen:
                    seen, changed = beat, now
                if seen != ENDED and now - changed > SILENT_SECONDS:
                    self.store.set("silent", str(neighbor))
                    if now - changed > self.timeout:
                        self.store.set("lost", str(neighbor))
                        lost = str(neighbor).encode()
            except NoAnswer as error:
                if time.monotonic() - answered <= self.timeout:
                    continue
                return self._leave(self._lost(STORE_HOST, str(error)), LEAVE_SECONDS, False)
            except RuntimeError as error:  # a lost connection is not restored
                if not self._stopped.wait(max(self.timeout, SILENT_SECONDS)):
                    self._leave(self._lost(STORE_HOST, reason_of(error)), LEAVE_SECONDS, False)
                return
            if lost is not None:
                seconds = f"no heartbeat for {self.timeout:g} s"
                return self._leave(self._lost(f"rank {lost.decode()}", seconds), LEAVE_SECONDS)
            if failed:
                with suppress(RuntimeError):
                    self._note_read()
                # The main thread may be writing a checkpoint; otherwise it cannot end without the failed rank.
                return self._leave(self._after(failed), self.timeout + LEAVE_SECONDS)
            if reason := self._device_error():
                return self._leave(self._stuck(reason), LEAVE_SECONDS)

    def _leave(self, error: InputError | Interrupted, seconds: float, reaches_store: bool = True) -> None:
        """End the process, unless the main thread ends by itself within these seconds."""
        deadline = time.monotonic() + seconds
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                if reaches_store:
                    self.store.set(f"beat {self.rank}", f"leaving {time.monotonic()}")
            except RuntimeError:
                reaches_store = False
            if time.monotonic() > deadline:
                status = INTERRUPTED if isinstance(error, Interrupted) else BAD_INPUT
                print_error(f"{'interrupted' if status == INTERRUPTED else 'error'}: {error}")
                if reaches_store:
                    self.note_failure(status, str(error))
                os._exit(status)

    # --- errors ------------------------------------------------------------------------------------------------------

    def _lost(self, who: str, reason: str) -> Interrupted:
        return Interrupted(f"rank {self.rank} lost contact with another rank: {who} is gone ({reason}); {RESUME}")

    def _after(self, failed: dict[str, Any]) -> InputError | Interrupted:
        text = f"rank {self.rank} ends because rank {failed['rank']} failed"
        if failed["status"] == INTERRUPTED:
            return Interrupted(f"{text}: {failed['line']}")
        return InputError(f"{text}: {failed['line']}")

    def _stuck(self, reason: str) -> InputError | Interrupted:
        """Return the error if all ranks are alive but one does not answer."""
        text = f"rank {self.rank} lost contact with another rank ({reason})"
        if _progress.is_set():
            return Interrupted(f"{text}; {RESUME}")
        return InputError(f"{text} before the first step, which running again will not change; {DOCTOR}")

    def _await_all(self, key: str, count: int, seconds: float) -> None:
        """On rank 0, wait until a counter has reached the number of ranks, at most these seconds."""
        deadline = time.monotonic() + seconds
        while self.rank == 0 and count < self.world and time.monotonic() < deadline:
            time.sleep(0.05)
            count = self.store.add(key, 0)

    def _note_read(self) -> int:
        """Record that this rank has read the failure, and return the number of ranks that have."""
        first, self._has_read = not self._has_read, True
        return int(self.store.add("read", int(first)))

    def _failed(self) -> dict[str, Any] | None:
        note = self.store.get("failed")
        return json.loads(note) if note else None


class NoAnswer(RuntimeError):
    """The store has not answered within `ANSWER_SECONDS`."""


class _Store:
    """A store whose requests raise `NoAnswer` if it does not answer in time.

    A request to an unreachable host blocks for 15 minutes, and blocks all others on the connection. Therefore a thread
    makes the requests.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._requests: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="heartbeat requests", daemon=True).start()

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(lambda: self._store.set(key, value))

    def compare_set(self, key: str, expected: str, value: str) -> None:
        self._ask(lambda: self._store.compare_set(key, expected, value))

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(lambda: self._store.add(key, amount)))

    def get(self, key: str) -> bytes | None:
        """Return the value of a key, None if it is not set."""
        found: bytes | None = self._ask(lambda: self._store.get(key) if self._store.check([key]) else None)
        return found

    def _ask(self, request: Callable[[], Any]) -> Any:
        reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests.put((request, reply))
        try:
            result = reply.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise NoAnswer(f"no answer within {ANSWER_SECONDS:g} s") from None
        if isinstance(result, RuntimeError):
            raise result
        return result

    def _serve(self) -> None:
        while True:
            request, reply = self._requests.get()
            try:
                reply.put(request())
            except RuntimeError as error:
                reply.put(error)


def nccl_error() -> str:
    """Return the error that NCCL reports for the process groups of this process, "" for none.

    Makes no CUDA calls, so that it is safe during the capture of a graph.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        with suppress(RuntimeError, AttributeError):
            error = group._get_backend(torch.device("cuda")).get_error()
            if error.name != "SUCCESS":
                return f"NCCL: {'no answer in time' if error.name == 'TIMEOUT' else error.name}"
    return ""


def reports_nccl_errors() -> bool:
    """Return whether this PyTorch (2.7 or later) reports failures by `nccl_error`; older ones only send a signal."""
    return hasattr(getattr(dist, "ProcessGroupNCCL", None), "get_error")
