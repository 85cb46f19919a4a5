"""Many ranks on one machine: 64 gloo ranks start and train, one is killed, and 48 resume.

python -m benchmarks.ranks [ranks=64] [left=48]

The ranks are forks of one process that has imported PyTorch, so that they share its pages; each runs `triderm train`
under DDP, with a small network on the cached tokens of a frozen tower. Printed are the seconds until the first step,
and for each rank its CPU seconds until then, the memory that it shares with no other process, and the bytes that it has
read, from files and sockets; the seconds from the loss of a rank to the end of the others; and the largest difference
of the losses to those of one rank that was not interrupted. Linux only. The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import Field

from benchmarks.compare_losses import largest_difference, losses
from triderm_dist.cli import run
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.settings import Section

IMPORTED = ("torch", "torchvision", "timm", "accelerate", "pyarrow.parquet", "simplejpeg",
            "triderm_dist.engine.crossval", "triderm_dist.doctor.preflight")  # fmt: skip
SETTINGS = """\
output: {folder}/run
tokens: {folder}/tokens
rank_timeout: {timeout}
data: {{shards: {folder}/shards, folds: 2, workers: 1}}
train:
  epochs: {epochs}
  global_batch: {batch}
  micro_batch: 1
  log_every: 1
  save_every: 2
  select: last
  validate_every: {epochs}
  trackers: []
  augment: {{token_variants: 0}}
  optim: {{lr: 1e-3, warmup_epochs: 1}}
models:
  tri:
    kind: trimodal
    width: 16
    heads: 2
    depth: 1
    tower: {{source: "timm:test_efficientnet", pretrained: false, image_size: 32, frozen: true, shared: true}}
"""


class RanksBenchmark(Section):
    ranks: int = Field(64, ge=2, description="ranks that start, of which one is killed")
    left: int = Field(48, ge=1, description="ranks that resume")
    batch: int = Field(192, ge=2, description="train.global_batch, a multiple of both numbers of ranks")
    lesions: int = Field(1536, ge=32, description="lesions of the synthetic set, two folds")
    epochs: int = Field(3, ge=2, description="epochs of the training")
    lost_at: int = Field(6, ge=1, description="the step after which a rank is killed")
    timeout: float = Field(120.0, ge=1, description="rank_timeout in seconds")
    scratch: str | None = Field(None, description="folder for written files; null takes the system's temporary folder")


def main(config: RanksBenchmark) -> None:
    folder = Path(tempfile.mkdtemp(dir=config.scratch))  # a TemporaryDirectory would be removed by the forks as well
    try:
        with _killed_at_exit() as running:
            result = measured(config, folder, running)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result))


def measured(config: RanksBenchmark, folder: Path, running: list[Rank]) -> dict[str, float]:
    settings = folder / "settings.yaml"
    settings.write_text(SETTINGS.format(folder=folder, **config.model_dump()), encoding="utf-8")
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork neither scans imported objects nor copies their pages

    def start(ranks: int, output: str) -> list[Rank]:
        port = _free_port()
        group = [Rank(number, ranks, port, folder / output, settings) for number in range(ranks)]
        running.extend(group)
        return group

    # One rank packs, computes the tokens and trains: the others find both.
    packer = Rank(0, 1, 0, folder / "packing", settings, lambda: _pack(folder / "shards", config.lesions))
    running.append(packer)
    expect([packer], [0])
    expect(start(1, "one"), [0])
    want = losses(_metrics(folder / "one"))
    steps = max(want)
    print(f"1 rank: {steps} steps of {config.batch} lesions")

    began, many = time.perf_counter(), folder / "many"
    group = start(config.ranks, "many")
    _wait(lambda: _steps(many) >= 1, group)
    seconds = time.perf_counter() - began
    cpu, private, read = (statistics.mean(values) for values in zip(*(rank.used() for rank in group), strict=True))
    print(f"{config.ranks} ranks: first step after {seconds:.1f} s; of each rank {cpu:.2f} CPU s, "
          f"{private / 1e6:.1f} MB of memory of its own, {read / 1e6:.2f} MB read", flush=True)  # fmt: skip
    _wait(lambda: _steps(many) >= config.lost_at, group)
    lost, done, began = group[config.ranks * 2 // 3], _steps(many), time.perf_counter()
    os.kill(lost.pid, signal.SIGKILL)
    expect(group, [-signal.SIGKILL if rank is lost else 3 for rank in group])
    ended = time.perf_counter() - began
    print(f"rank {lost.number} killed after step {done}: all others ended with 3 after {ended:.1f} s")

    began = time.perf_counter()
    left = start(config.left, "many")
    expect(left, [0] * config.left)
    resumed = time.perf_counter() - began
    first = _resumed_at(folder / "many.log")
    difference, step = largest_difference(losses(_metrics(many)), want)
    print(f"{config.left} ranks resumed at step {first} and ended after {resumed:.1f} s; losses of all {steps} "
          f"steps differ from those of one rank by at most {difference:.1e} (step {step})")  # fmt: skip
    return {
        "ranks": config.ranks, "left": config.left, "resumed_at": first, "start_s": round(seconds, 1),
        "start_cpu_s_a_rank": round(cpu, 2), "memory_mb_a_rank": round(private / 1e6, 1),
        "read_mb_a_rank": round(read / 1e6, 2), "ended_after_s": round(ended, 1), "resume_s": round(resumed, 1),
        "largest_difference": float(difference),
    }  # fmt: skip


class Rank:
    """A forked process that trains as one rank of `world`, or calls a function."""

    def __init__(
        self, number: int, world: int, port: int, output: Path, settings: Path, work: Callable[[], None] | None = None
    ) -> None:
        self.number, self.log = number, output.with_name(f"{output.name}.log")
        self.status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRIDERM_LAUNCHER": os.getppid()}  # fmt: skip
            if world > 1:
                os.environ |= {name: str(value) for name, value in variables.items()}
            _run(work or (lambda: _train(settings, output)), self.log)

    def poll(self) -> int | None:
        """Return the exit code, -N for signal N; None while the process runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def used(self) -> tuple[float, int, int]:
        """Return its CPU seconds, bytes of memory that no other process shares, and bytes read so far."""
        folder = Path(f"/proc/{self.pid}")
        ticks = folder.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        lines = folder.joinpath("smaps_rollup").read_text().splitlines()
        private = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
        read = int(folder.joinpath("io").read_text().split("rchar: ")[1].split()[0])
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), private, read


def _run(work: Callable[[], None], log: Path) -> NoReturn:
    """Call a function in a fork, with its output in a file, and exit as a program would."""
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _train(settings: Path, output: Path) -> None:
    from triderm_dist.commands.train import start

    sys.argv = ["triderm train", "--config", str(settings), f"output={output}"]
    start()


def _pack(folder: Path, lesions: int) -> None:
    from triderm_dist.engine.bench import synthetic_shards

    synthetic_shards(folder, lesions, 32)


def expect(group: Sequence[Rank], statuses: Sequence[int]) -> None:
    """Wait for ranks to end. Raises RuntimeError where one ends with another exit code."""
    while any([rank.poll() is None for rank in group]):
        time.sleep(0.05)
    for rank, status in zip(group, statuses, strict=True):
        if rank.poll() != status:
            raise RuntimeError(
                f"rank {rank.number} ended with {rank.poll()}, not {status}: {rank.log.read_text()[-3000:]}"
            )


def _wait(condition: Callable[[], bool], group: Sequence[Rank]) -> None:
    while not condition():
        if any([rank.poll() is not None for rank in group]):
            raise RuntimeError(f"a rank has ended: {group[0].log.read_text()[-3000:]}")
        time.sleep(0.05)


def _metrics(output: Path) -> Path:
    return output / "tri" / "fold-0" / "metrics.jsonl"


def _steps(output: Path) -> int:
    """Return the number of the last logged step."""
    return max((line["step"] for line in read_metrics(_metrics(output)) if line["kind"] == "train"), default=0)


def _resumed_at(log: Path) -> int:
    """Return the step that the last training of a log resumed from."""
    lines = [line.split("resumed at step ")[1] for line in log.read_text().splitlines() if "resumed at step " in line]
    return int(lines[-1].split()[0].replace(",", "")) if lines else 0


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def _killed_at_exit() -> Iterator[list[Rank]]:
    """Yield a list of ranks; those that run at the end are killed."""
    running: list[Rank] = []
    try:
        yield running
    finally:
        for rank in running:
            if rank.poll() is None:
                os.kill(rank.pid, signal.SIGKILL)


if __name__ == "__main__":
    run(RanksBenchmark, main, __doc__)
