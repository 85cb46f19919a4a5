"""Packing on a Ray cluster writes the bytes of one process, also where a machine is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Challenge
from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards

LESIONS = 44


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_packs_the_bytes_of_one_process(
    make_challenge: Callable[..., Challenge], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    source = make_challenge(lesions=LESIONS, size=(1600, 1200)).folder
    pack_shards(read_challenge(source), tmp_path / "one", short_side=32, shard_samples=2)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        command = [sys.executable, "-m", "triderm_dist.commands.pack", f"source={source}", f"output={tmp_path}/many"]
        command += ["short_side=32", "shard_samples=2", "groups=plain", f"address={cluster.address}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until = time.monotonic() + HANG_SECONDS
        while len([*tmp_path.glob("many.part/rows/*.parquet")]) < 4 and time.monotonic() < until:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        assert len([*tmp_path.glob("many.part/rows/*.parquet")]) < LESIONS // 2  # in the middle
        text, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, text
    assert "2 shards at once" in text
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()} == expected
