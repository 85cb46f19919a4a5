"""Packing and indexing on a Ray cluster give the bytes of one process, also where a machine is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Challenge
from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.commands.index import IndexConfig
from triderm_dist.commands.index import main as index
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.format import INDEX, SAMPLES
from triderm_dist.data.shards.pack import pack_shards

LESIONS, SHARD_LESIONS = 44, 2

pytestmark = pytest.mark.slow


def run_and_lose_a_machine(command: list[str], finished: Callable[[], int], folder: Path) -> str:
    """Run a program of the shards on a cluster of two machines, of which one is lost in the middle, in a working
    folder; return what it printed.  finished: counts the shards that are finished.
    """
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        program, *settings = command
        words = [sys.executable, "-m", f"triderm_dist.commands.{program}", *settings, f"address={cluster.address}"]
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until = time.monotonic() + HANG_SECONDS
        while finished() < 4 and time.monotonic() < until:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        assert finished() < LESIONS // SHARD_LESIONS  # in the middle
        text, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, text
    assert "2 shards at once" in text
    return text


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_packing(make_challenge: Callable[..., Challenge], tmp_path: Path) -> None:
    source = make_challenge(lesions=LESIONS, size=(1600, 1200)).folder
    pack_shards(read_challenge(source), tmp_path / "one", short_side=32, shard_samples=SHARD_LESIONS)
    command = ["pack", f"source={source.name}", "output=out/many", "short_side=32", f"shard_samples={SHARD_LESIONS}"]
    text = run_and_lose_a_machine(
        [*command, "groups=plain"],
        lambda: len([*source.parent.glob("out/many.part/rows/*.parquet")]),
        source.parent,
    )
    assert "packing on a Ray cluster" in text
    assert content(source.parent / "out" / "many") == content(tmp_path / "one")


def test_packing_into_a_url(make_challenge: Callable[..., Challenge], tmp_path: Path) -> None:
    source = make_challenge(lesions=LESIONS, size=(1600, 1200)).folder
    pack_shards(read_challenge(source), tmp_path / "one", short_side=32, shard_samples=SHARD_LESIONS)
    bucket = tmp_path / "bucket"
    command = ["pack", f"source={source.name}", f"output={bucket.as_uri()}", "short_side=32"]
    run_and_lose_a_machine(
        [*command, f"shard_samples={SHARD_LESIONS}", "groups=plain"],
        lambda: len([*bucket.glob("rows.part/*.parquet")]),
        source.parent,
    )
    assert content(bucket) == content(tmp_path / "one")
    assert not list(source.parent.rglob("*.part"))


def test_indexing(make_challenge: Callable[..., Challenge], tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    source = make_challenge(lesions=LESIONS, size=(1600, 1200)).folder
    pack_shards(read_challenge(source), folder, short_side=None, shard_samples=SHARD_LESIONS)
    (folder / INDEX).unlink()  # the tars are as another program writes them
    (folder / SAMPLES).unlink()
    index(IndexConfig(folder=str(folder), groups="plain"))
    expected = content(folder)
    (folder / INDEX).unlink()
    (folder / SAMPLES).unlink()
    text = run_and_lose_a_machine(
        ["index", "folder=tars", "groups=plain"],
        lambda: len([*tmp_path.glob("tars.index.part/*.parquet")]),
        tmp_path,
    )
    assert "scanning on a Ray cluster" in text
    assert content(folder) == expected and not list(tmp_path.glob("*.part"))
