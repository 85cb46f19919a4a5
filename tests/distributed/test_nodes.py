"""Two hosts: network namespaces with addresses of their own on this machine, two ranks on each.

`pytest -m slow -rP tests/distributed/test_nodes.py` also prints what was measured.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.processes import HANG_SECONDS, ROOT, launch, wait_for
from triderm_dist.monitoring.metrics_log import read_metrics

SETTINGS = """
data: {folds: 2}
rank_timeout: 60
train: {epochs: 6, global_batch: 16, micro_batch: 4, log_every: 1, optim: {lr: 1e-3, warmup_epochs: 1}}
models:
  tri:
    width: 32
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 1, freeze_dermoscopic: 0}
"""
TIMEOUT = 60
"""Seconds of rank_timeout above."""
HEAD = "192.0.2.1"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Launcher:
    """What one host runs, and where it writes."""

    process: subprocess.Popen
    log: Path

    def ended(self) -> tuple[int, str]:
        """(exit status, output)."""
        return self.process.wait(timeout=HANG_SECONDS), self.log.read_text()


@dataclass
class Host:
    """A network namespace with one interface, `eth0`."""

    name: str
    address: str
    folder: Path
    started: list["Launcher"] = field(default_factory=list)

    def start(self, *options: str, program: list[str]) -> "Launcher":
        log = self.folder / f"{self.name}-{len(self.started)}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PET_LOCAL_ADDR": self.address,
        }
        with log.open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, sys.executable, "-m", "launch.ranks", "--config_file",
                 "accelerate_configs/ddp_multi_node.yaml", "--num_machines", "2", "--num_processes", "4",
                 "--main_process_ip", HEAD, *options, "-m", *program],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started.append(Launcher(process, log))
        return self.started[-1]

    def die(self) -> None:
        """Lose all processes at once, as when the power goes."""
        found = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def link(self, state: str) -> None:
        ip("-n", self.name, "link", "set", "eth0", state)


@pytest.fixture
def hosts(tmp_path_factory) -> Iterator[tuple[Host, Host]]:
    folder = tmp_path_factory.mktemp("logs")
    first, second = (Host(f"triderm-{os.getpid()}-{n}", f"192.0.2.{n}", folder) for n in (1, 2))
    try:
        for host in (first, second):
            ip("netns", "add", host.name)
        ip("-n", first.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second.name)
        for host in (first, second):
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.link("up")
        yield first, second
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here (they need root and iproute2): {error}")
    finally:
        for host in (first, second):
            if host.started:
                host.die()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def settings(packed, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(SETTINGS)
    return ["launch.train", "--config", str(file), f"data.shards={packed}"]


@pytest.fixture(scope="module")
def one_host(settings, tmp_path_factory) -> Path:
    """The run of four ranks on one host that nothing disturbed."""
    folder = tmp_path_factory.mktemp("one-host")
    launch(*settings, f"output={folder}", ranks=4, config="accelerate_configs/ddp.yaml")
    return folder


def losses(run: Path) -> np.ndarray:
    """(steps, 2): step and loss."""
    lines = read_metrics(run / "tri" / "fold-0" / "metrics.jsonl")
    return np.array([(line["step"], line["loss"]) for line in lines if line["kind"] == "train"])


def assert_same_but_for_sums(one: np.ndarray, other: np.ndarray) -> None:
    """A resumed DDP starts with other buckets, so that its ring of four ranks adds in another order."""
    assert np.array_equal(one[:, 0], other[:, 0])
    far = np.abs(one[:, 1] - other[:, 1]).max()
    print(f"{len(one)} steps, largest difference of a loss {far:.1g}")
    assert far < 1e-6


def wait_for_step(number: int, run: Path, launcher: Launcher) -> None:
    wait_for(lambda: len(losses(run)) >= number, launcher.process, launcher.log.read_text)


def static(host: int) -> list[str]:
    return ["--machine_rank", str(host)]


@pytest.mark.slow
def test_two_hosts_give_the_losses_of_one_host(hosts, settings, one_host, tmp_path):
    program = [*settings, f"output={tmp_path}"]
    started = [host.start(*static(n), program=program) for n, host in enumerate(hosts)]
    for launcher in started:
        status, output = launcher.ended()
        assert status == 0, output
    assert "4 rank(s)" in started[0].log.read_text()
    assert len(losses(tmp_path)) == 24
    assert np.array_equal(losses(tmp_path), losses(one_host))
    print("24 steps, the same losses to the last bit")


@pytest.mark.slow
def test_lost_host_is_reported_within_the_timeout_and_the_run_resumes(hosts, settings, one_host, tmp_path):
    program = [*settings, f"output={tmp_path}"]
    started = [host.start(*static(n), program=program) for n, host in enumerate(hosts)]
    wait_for_step(6, tmp_path, started[0])
    cut = time.monotonic()
    hosts[1].link("down")
    results = [launcher.ended() for launcher in started]
    took = time.monotonic() - cut
    print(f"both hosts had ended {took:.0f} s after the cut, with rank_timeout={TIMEOUT}")
    assert TIMEOUT < HANG_SECONDS < 1800  # what `ended` waits for, and what gloo does if it is not told
    for status, output in results:
        told = [line for line in output.splitlines() if line.startswith("interrupted: ")]
        assert status == 3 and len(told) == 2, output
        assert all("lost contact with another rank" in line and "rerun the same command" in line for line in told)
        assert "Traceback" not in output
    before = len(losses(tmp_path))
    assert 6 <= before < 24
    hosts[1].link("up")
    for launcher in [host.start(*static(n), program=program) for n, host in enumerate(hosts)]:
        status, output = launcher.ended()
        assert status == 0, output
    assert_same_but_for_sums(losses(tmp_path), losses(one_host))


@pytest.mark.slow
def test_dead_host_is_replaced_and_the_run_resumes(hosts, settings, one_host, tmp_path):
    program = [*settings, f"output={tmp_path}"]
    # Hosts in namespaces share a name, so that the one where all meet does not know that it is meant.
    elastic = ["--rdzv_backend", "c10d", "--max_restarts", "3", "--rdzv_conf"]
    first, _ = (host.start(*elastic, f"is_host={1 - n}", program=program) for n, host in enumerate(hosts))
    wait_for_step(6, tmp_path, first)
    hosts[1].die()
    died = time.monotonic()
    replacement = hosts[1].start(*elastic, "is_host=0", program=program)
    before = len(losses(tmp_path))
    wait_for_step(before + 1, tmp_path, first)
    print(f"the first new step came {time.monotonic() - died:.0f} s after the death")
    for launcher in (first, replacement):
        status, output = launcher.ended()
        assert status == 0, output
    assert_same_but_for_sums(losses(tmp_path), losses(one_host))
