"""Findings of the doctor on Accelerate config files and their port."""

import os
import socket
from pathlib import Path

import pytest
import yaml

from tests.doctor.conftest import FROZEN, run_doctor
from tests.processes import ROOT
from triderm_dist.doctor.findings import Finding
from triderm_dist.doctor.launcher import launcher_findings, read_launcher
from triderm_dist.schema import ConfigError


def launcher_file(folder: Path, **settings) -> Path:
    """Write accelerate_configs/ddp_multi_node.yaml with changed settings."""
    raw = yaml.safe_load((ROOT / "accelerate_configs" / "ddp_multi_node.yaml").read_text())
    path = folder / "launcher.yaml"
    path.write_text(yaml.safe_dump({**raw, **settings}))
    return path


def launcher_finding(launcher: Path | None, name: str, gpus: int = 0) -> Finding:
    found = launcher_findings(launcher and read_launcher(launcher), gpus, cores=2)
    return next(each for each in found if each.name == name)


def test_port_in_use_is_reported_with_its_process(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host in ("localhost", "127.0.0.2"):
            file = launcher_file(tmp_path, main_process_port=port, main_process_ip=host)
            found = launcher_finding(file, "port")
            assert found.state == "error" and f"{port} is in use by" in found.text, found
            assert f"process {os.getpid()}" in found.text and "--main_process_port" in found.advice
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert launcher_finding(None, "port").state == "error"
        done = run_doctor(*FROZEN, f"output={tmp_path}", f"launcher={file}", "ranks=1")
        assert done.returncode == 2 and f"port ({port} is in use" in done.stderr.splitlines()[-1]
    assert launcher_finding(file, "port").text == f"{port} is free"
    monkeypatch.delenv("MASTER_PORT")
    assert launcher_findings(None, 0, 2) == []
    assert launcher_finding(ROOT / "accelerate_configs" / "ddp.yaml", "port").text == "any free one"


def test_main_node_address_is_checked(tmp_path):
    no_port = launcher_finding(launcher_file(tmp_path, main_process_port=0), "port")
    assert no_port.state == "warning" and "--main_process_ip" in no_port.advice
    assert launcher_finding(launcher_file(tmp_path, main_process_ip="no-such-host.invalid"), "port").state == "error"
    remote = launcher_finding(launcher_file(tmp_path, main_process_ip="192.0.2.77"), "port")
    assert remote.state == "ok" and "another host" in remote.text


def test_more_processes_than_gpus_are_reported(tmp_path):
    file = launcher_file(tmp_path, main_process_port=0)
    assert launcher_finding(file, "processes", gpus=8).text.endswith("16 processes on 2 nodes, 8 on each")
    few = launcher_finding(file, "processes", gpus=4)
    assert few.state == "error" and "--num_processes 8" in few.advice
    assert launcher_finding(file, "processes", gpus=0).state == "warning"


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "num_processes: many",
        "num_processes: .inf",
        "num_processes: 1\nnum_processes: 2",
        "a: {",
        "",
        "seed: 1\ntrain: {epochs: 3}",
        "distributed_type: 'NO'\nseed: 1",
    ],
)
def test_invalid_launcher_file_is_reported(tmp_path, text):
    path = tmp_path / "launcher.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"launcher\.yaml: .*; accelerate_configs/ has such files"):
        read_launcher(path)
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_launcher(tmp_path / "none.yaml")


def test_unsupported_deepspeed_version_fails_the_check(tmp_path):
    about = tmp_path / "packages" / "deepspeed-0.14.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.14.0\n")
    path = f"{about.parents[1]}:{ROOT}"
    words = [*FROZEN, f"output={tmp_path}", "ranks=1"]
    done = run_doctor(*words, "launcher=accelerate_configs/deepspeed_zero2.yaml", PYTHONPATH=path)
    assert done.returncode == 2
    assert "deepspeed (deepspeed 0.14.0; the launcher needs deepspeed" in done.stderr.splitlines()[-1]
