"""Ranks under NCCL: every strategy, and the exit status where ranks cannot work or are lost.

With two GPUs and more, tests/distributed runs under NCCL too: `pytest tests/distributed`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from benchmarks.compare_losses import largest_difference, losses
from tests.gpu import matrix
from tests.gpu.training import settings, words_of
from tests.processes import finish, start, wait_for
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.crossval import run_folds
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_predictions

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3_offload")
TRAINED = ("train.epochs=2", "train.precision=bf16", "data.folds=2", "train.log_every=1")
BAD_INPUT, INTERRUPTED = 2, 3

Ended = dict[str, tuple[Path, subprocess.CompletedProcess]]


def start_rank(shards: Path, output: Path, strategy: str) -> subprocess.Popen:
    """Start a training of fold 0 in one process that is a rank of one: collectives and sharding are those of many."""
    words = words_of("trimodal", *TRAINED, f"data.shards={shards}", f"output={output}", "fold=0")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    environment = {**rank, "MASTER_PORT": str(matrix.free_port()), **matrix.STRATEGIES[strategy]}
    return start("launch.train", *words, fork=False, environment=environment)


def start_ranks(shards: Path, output: Path, ranks: int, *more: str) -> subprocess.Popen:
    """Start a training of fold 0 as this many ranks, under DDP."""
    words = words_of("trimodal", *TRAINED, f"data.shards={shards}", f"output={output}", "fold=0", *more)
    return start("launch.train", *words, ranks=ranks, config="accelerate_configs/ddp.yaml", fork=False)


@pytest.fixture(scope="module")
def ended(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Output folder and process of each strategy, and of DDP with one rank more than there are GPUs ("crowded").

    They run at the same time: most of what they do is importing.
    """
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    ranks = torch.cuda.device_count() + 1
    folders = {name: tmp_path_factory.mktemp(name) for name in (*STRATEGIES, "crowded")}
    batch = (f"train.global_batch={2 * ranks}", "train.micro_batch=2")
    processes = {"crowded": start_ranks(shards, folders["crowded"], ranks, *batch)}
    processes |= {name: start_rank(shards, folders[name], name) for name in STRATEGIES}
    return {name: (folders[name], finish(process)) for name, process in processes.items()}


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fold folder of the same training in one process."""
    output = tmp_path_factory.mktemp("alone")
    run_folds(settings("trimodal", *TRAINED, f"output={output}"), read_index(shards), ["net"], [0])
    return output / "net" / "fold-0"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_trains_as_one_process(strategy: str, ended: Ended, alone: Path) -> None:
    output, done = ended[strategy]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    folder = output / "net" / "fold-0"
    difference, _ = largest_difference(losses(folder / "metrics.jsonl"), losses(alone / "metrics.jsonl"))
    assert difference < matrix.TOLERANCE
    first, second = (read_predictions(path / "predictions.parquet").logits for path in (folder, alone))
    np.testing.assert_allclose(first, second, atol=0.1)


def test_more_ranks_than_gpus_are_refused(ended: Ended) -> None:
    """A fault that every start would meet again: not the status by which a scheduler starts it again."""
    _, done = ended["crowded"]
    assert done.returncode == BAD_INPUT, done.stdout[-2000:] + done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank_ends_the_others(number: signal.Signals, shards: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    process = start_ranks(shards, tmp_path, 2, "rank_timeout=20", "train.epochs=1000")
    log = tmp_path / "net" / "fold-0" / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(read_metrics(log)) > 3, process)
    ranks = [each for each in psutil.Process(process.pid).children(recursive=True) if "RANK" in environment_of(each)]
    (last,) = (each for each in ranks if environment_of(each)["RANK"] == "1")
    last.send_signal(number)
    try:
        assert finish(process).returncode == INTERRUPTED
    finally:
        for each in ranks:
            if each.is_running():
                os.kill(each.pid, signal.SIGKILL)


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment of a process that this user may read, else an empty one."""
    try:
        return process.environ()
    except psutil.Error:
        return {}
