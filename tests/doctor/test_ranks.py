"""The doctor on several ranks: differences between them, and ranks that do not respond."""

import re
import socket
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.doctor.conftest import FROZEN, run_doctor
from tests.processes import HANG_SECONDS, ROOT, launch
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.doctor.findings import Finding
from triderm_dist.doctor.ranks import RankReport, compare, name_ranks

RANK = """
import os, pathlib, subprocess, sys, time
rank, (root, *words) = os.environ["RANK"], sys.argv[1:]
folder = pathlib.Path.cwd()
environment = {**os.environ, "PYTHONPATH": root}
if rank == "1":
    os.chdir(folder.parent / "other" if (folder.parent / "other").exists() else folder)
    environment["PYTHONPATH"] = f"{folder.parent / 'packages'}:{root}"
status = subprocess.run([sys.executable, "-m", "launch.doctor", *words], env=environment).returncode
(folder / f"status.{rank}").write_text(str(status))
while len(list(folder.glob("status.*"))) < 2:
    time.sleep(0.05)
sys.exit(status)
"""
"""Program of a rank: rank 1 runs the doctor in another folder and with other packages, if these exist."""


def run_on_ranks(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run the doctor on two ranks in FOLDER/own; each writes its exit status to status.RANK."""
    script, own = folder / "rank.py", folder / "own"
    script.write_text(RANK)
    own.mkdir(exist_ok=True)
    arguments = [str(ROOT), *FROZEN, "output=run", f"answer_seconds={HANG_SECONDS}", *words]
    return launch(
        str(script),
        *arguments,
        ranks=2,
        config=str(ROOT / "accelerate_configs" / "ddp.yaml"),
        folder=own,
        check=False,
        environment={"ACCELERATE_USE_CPU": "true"},
    )


def statuses(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted((folder / "own").glob("status.*"))]


def test_equal_ranks_pass(make_challenge, tmp_path):
    pack_shards(read_challenge(make_challenge().folder), tmp_path / "own" / "shards", short_side=None)
    done = run_on_ranks(tmp_path, "data.shards=shards")
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == ["0", "0"]
    assert done.stdout.count("a run can start") == 1 and done.stdout.count("\nmachine\n") == 1
    assert "25 MiB over 2 ranks" in done.stdout and "96 = 2 rank(s)" in done.stdout
    assert re.search(r"22 lesions, index [0-9a-f]{12}: the same on ranks 0-1 on ", done.stdout)


def test_missing_folder_and_version_mismatch_are_reported_once(make_challenge, tmp_path):
    pack_shards(read_challenge(make_challenge().folder), tmp_path / "own" / "shards", short_side=None)
    (tmp_path / "other").mkdir()
    about = tmp_path / "packages" / "accelerate-1.0.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 1.0.0\n")
    done = run_on_ranks(tmp_path, "data.shards=shards")
    assert done.returncode == 2, done.stdout + done.stderr
    assert statuses(tmp_path) == ["2", "2"]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    host = socket.gethostname()
    assert re.search(rf"rank 0 on {host}: 22 lesions, index \w+; rank 1 on {host}: shards: no such folder", error)
    assert re.search(rf"accelerate rank 0 on {host}: [\d.]+; rank 1 on {host}: 1\.0\.0", error)
    assert "a folder that all nodes share" in done.stdout and "training" in done.stdout


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (
            0,
            r"error: a run cannot start: answers \(rank 1 on an unknown host did not connect to localhost:\d+ within",
        ),
        (1, r"error: rank 1 on \S+ cannot reach rank 0 at localhost:\d+ \("),
    ],
    ids=["rank 1 is absent", "rank 0 is absent"],
)
def test_unresponsive_rank_is_named(tmp_path, rank, message):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    done = run_doctor(*FROZEN, f"output={tmp_path}", "answer_seconds=1", **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr.splitlines()[-1]), done.stderr


def test_differences_between_ranks_are_reported():
    def compared(timings: dict, **of_rank_5) -> dict[str, Finding]:
        hosts = {rank: "ab"[rank // 4] for rank in range(8)}
        same = RankReport("a", "22 lesions", True, {"torch": "2.14.1"}, "H100", 4, 0, [])
        reports = {rank: replace(same, host=hosts[rank], local_rank=rank % 4) for rank in hosts}
        reports[5] = replace(reports[5], **of_rank_5)
        problem = Finding("/dev/shm", "64 MiB", "error", "more")
        reports[4] = replace(reports[4], problems=[asdict(problem)])
        rendezvous = SimpleNamespace(world=8, address="a:1", seconds=30)
        return {each.name: each for each in compare(rendezvous, hosts, reports, timings)}

    good = {rank: {"gloo": 0.1, "NCCL": 0.01, "clock": 100.0 + 0.01 * rank} for rank in range(8)}
    found = compared(good)
    assert found.pop("b: /dev/shm").state == "error"
    assert {each.state for each in found.values()} == {"ok"}
    assert found["ranks"].text == "8: ranks 0-3 on a, ranks 4-7 on b" and "10 ms by NCCL" in found["all-reduce"].text
    nodes = {rank: f"n{rank // 2}" for rank in range(20)}
    assert name_ranks(nodes, nodes).endswith("ranks 10-11 on n5 and on 4 more host(s)")
    assert compared(good, software={"torch": "2.13"})["software"].text.endswith("rank 5 on b: 2.13")
    assert compared(good, gpu="")["GPUs"].state == "error" and compared(good, gpu="T4")["GPUs"].state == "warning"
    late = compared({**good, 5: {**good[5], "clock": 140.0}})["clocks"]
    assert late.state == "warning" and late.text.startswith("rank 5 on b: +40.0 s")
    hangs = {rank: {"gloo": 0.1, "clock": 100.0, "error": "did not end within 30 s"} for rank in range(8)}
    assert compared(hangs)["all-reduce"].text == "ranks 0-3 on a, ranks 4-7 on b: NCCL: did not end within 30 s"
    dead = compared({rank: each for rank, each in hangs.items() if rank != 5})["all-reduce"]
    assert dead.state == "error" and dead.text.startswith("rank 5 on b stopped answering")
