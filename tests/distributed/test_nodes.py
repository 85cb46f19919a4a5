"""Training on two hosts, simulated by network namespaces with two ranks each.

`pytest -m slow -rP tests/distributed/test_nodes.py` also prints the measured times and differences.
"""

import contextlib
import os
import shutil
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
    """The launcher process of one host and its log file."""

    process: subprocess.Popen
    log: Path

    def wait(self) -> tuple[int, str]:
        """Wait for the launcher; return (exit status, output)."""
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

    def kill(self) -> None:
        """Kill all processes of the host at once, as a power failure does."""
        found = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def set_link(self, state: str) -> None:
        """Set the network interface "up" or "down"."""
        ip("-n", self.name, "link", "set", "eth0", state)


@pytest.fixture
def hosts(tmp_path_factory) -> Iterator[tuple[Host, Host]]:
    if not shutil.which("ip"):
        pytest.skip("network namespaces need iproute2")
    folder = tmp_path_factory.mktemp("logs")
    first, second = (Host(f"triderm-{os.getpid()}-{n}", f"192.0.2.{n}", folder) for n in (1, 2))
    try:
        for host in (first, second):
            ip("netns", "add", host.name)
        ip("-n", first.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second.name)
        for host in (first, second):
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.set_link("up")
        yield first, second
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not available (they need root): {error}")
    finally:
        for host in (first, second):
            if host.started:
                host.kill()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def settings(packed, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(SETTINGS)
    return ["launch.train", "--config", str(file), f"data.shards={packed}"]


@pytest.fixture(scope="module")
def one_host(settings, tmp_path_factory) -> Path:
    """Folder of an uninterrupted run of four ranks on one host."""
    folder = tmp_path_factory.mktemp("one-host")
    launch(*settings, f"output={folder}", ranks=4, config="accelerate_configs/ddp.yaml")
    return folder


def losses(run: Path) -> np.ndarray:
    """Return (steps, 2): step and training loss."""
    lines = read_metrics(run / "tri" / "fold-0" / "metrics.jsonl")
    return np.array([(line["step"], line["loss"]) for line in lines if line["kind"] == "train"])


def assert_same_losses_up_to_rounding(one: np.ndarray, other: np.ndarray) -> None:
    """After a resume DDP uses other buckets, so that its ring all-reduce over four ranks sums in another order."""
    assert np.array_equal(one[:, 0], other[:, 0])
    difference = np.abs(one[:, 1] - other[:, 1]).max()
    print(f"{len(one)} steps, largest difference of a loss {difference:.1g}")
    assert difference < 1e-6


def wait_for_step(number: int, run: Path, launcher: Launcher) -> None:
    wait_for(lambda: len(losses(run)) >= number, launcher.process, launcher.log.read_text)


def machine_rank(host: int) -> list[str]:
    return ["--machine_rank", str(host)]


@pytest.mark.slow
def test_lost_host_is_reported_within_the_timeout_and_the_run_resumes(hosts, settings, tmp_path, request):
    program = [*settings, f"output={tmp_path}"]
    started = [host.start(*machine_rank(n), program=program) for n, host in enumerate(hosts)]
    wait_for_step(6, tmp_path, started[0])
    link_down = time.time()
    hosts[1].set_link("down")
    one_host = request.getfixturevalue("one_host")  # trained while the ranks wait for the timeout
    results = [launcher.wait() for launcher in started]
    took = max(launcher.log.stat().st_mtime for launcher in started) - link_down
    print(f"both hosts exited {took:.0f} s after the link went down, with rank_timeout={TIMEOUT}")
    assert took < TIMEOUT + 60 and TIMEOUT < HANG_SECONDS < 1800  # shorter than the timeouts of `wait` and of gloo
    for status, output in results:
        messages = [line for line in output.splitlines() if line.startswith("interrupted: ")]
        # The first rank of a host that ends may end the other one, by the launcher, before it knows why.
        assert status == 3 and any("lost contact with another rank" in line for line in messages), output
        assert all("rerun the same command" in line for line in messages), output
        assert "Traceback" not in output
    before = len(losses(tmp_path))
    assert 6 <= before < 24
    hosts[1].set_link("up")
    for launcher in [host.start(*machine_rank(n), program=program) for n, host in enumerate(hosts)]:
        status, output = launcher.wait()
        assert status == 0, output
    assert_same_losses_up_to_rounding(losses(tmp_path), losses(one_host))


@pytest.mark.slow
def test_two_hosts_give_the_losses_of_one_host(hosts, settings, one_host, tmp_path):
    program = [*settings, f"output={tmp_path}"]
    started = [host.start(*machine_rank(n), program=program) for n, host in enumerate(hosts)]
    for launcher in started:
        status, output = launcher.wait()
        assert status == 0, output
    assert "4 ranks on " in started[0].log.read_text()
    assert len(losses(tmp_path)) == 24
    assert np.array_equal(losses(tmp_path), losses(one_host))
    print("24 steps, losses bit for bit equal")


@pytest.mark.slow
def test_dead_host_is_replaced_and_the_run_resumes(hosts, settings, one_host, tmp_path):
    program = [*settings, f"output={tmp_path}"]
    # Namespaces share one host name, from which the rendezvous host cannot be recognized: set is_host.
    elastic = ["--rdzv_backend", "c10d", "--max_restarts", "3", "--rdzv_conf"]
    first, _ = (host.start(*elastic, f"is_host={1 - n}", program=program) for n, host in enumerate(hosts))
    wait_for_step(6, tmp_path, first)
    hosts[1].kill()
    killed = time.monotonic()
    replacement = hosts[1].start(*elastic, "is_host=0", program=program)
    before = len(losses(tmp_path))
    wait_for_step(before + 1, tmp_path, first)
    print(f"the first new step came {time.monotonic() - killed:.0f} s after the kill")
    for launcher in (first, replacement):
        status, output = launcher.wait()
        assert status == 0, output
    assert_same_losses_up_to_rounding(losses(tmp_path), losses(one_host))
