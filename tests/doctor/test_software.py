"""Findings of the doctor on outdated, missing and conflicting packages."""

import builtins
import importlib
import sys

from tests.doctor.conftest import SMALL
from triderm_dist.config import Experiment, load
from triderm_dist.doctor import examine
from triderm_dist.doctor.findings import errors, print_findings
from triderm_dist.doctor.software import (
    architecture_finding,
    architectures,
    compiler,
    compiler_finding,
    nccl_finding,
    versions,
)


def test_two_nccl_packages_collide():
    assert nccl_finding(["nvidia-nccl-cu13 2.30.7"], gpu=True).state == "ok"
    both = ["nvidia-nccl-cu12 2.28.9", "nvidia-nccl-cu13 2.30.7"]
    assert nccl_finding(both, gpu=True).state == "error" and "xgboost-cu13" in nccl_finding(both, gpu=True).advice
    assert nccl_finding(both, gpu=False).state == "warning"
    assert "pip uninstall xgboost-cu13" in nccl_finding(both, gpu=True, cuda="12").advice


def test_missing_c_compiler_or_header_is_reported_where_blocks_are_compiled_on_a_gpu(tmp_path, monkeypatch):
    header = tmp_path / "Python.h"
    assert compiler_finding("/usr/bin/gcc", header).state == "ok"
    neither = compiler_finding(None, None)
    assert neither.state == "error" and "a C compiler and Python.h not found" in neither.text
    assert "train.compile=false" in neither.advice
    assert compiler_finding("gcc", None).text.startswith("Python.h not found")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "a C compiler" in compiler().text
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "a C compiler" in compiler().text


def test_gpu_that_torch_is_not_built_for_is_reported():
    built = ["sm_75", "sm_80", "sm_86", "sm_90a", "compute_120"]
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)):
        assert architecture_finding("a GPU", capability, built, "13.0") is None
    for capability in ((7, 0), (6, 1), (10, 0)):
        found = architecture_finding("a GPU", capability, built, "13.0")
        assert found and found.state == "error" and f"sm_{capability[0]}{capability[1]}, but torch" in found.text
    assert architecture_finding("a GPU", (7, 0), [], "13.0") is None and architectures([]) == []


def test_outdated_and_missing_packages_are_reported(monkeypatch):
    installed = {"deepspeed": "0.14.0", "torch": "2.14.1"}

    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {each.name: each for each in versions()}
    assert found["deepspeed"].state == "warning" and "deepspeed" in found["deepspeed"].advice
    assert found["xgboost"].state == "ok" and found["xgboost"].advice == "pip install 'triderm-dist[stack]'"
    assert found["accelerate"].state == "error" and "accelerate" in found["accelerate"].advice
    assert found["ray"].state == "ok" and "triderm search" in found["ray"].text
    assert found["packages"].text.startswith("torch 2.14.1")
    del installed["deepspeed"]
    assert {each.name: each.state for each in versions()}["deepspeed"] == "ok"
    states = {each.name: each.state for each in versions({"deepspeed", "xgboost"})}
    assert (states["deepspeed"], states["xgboost"], states["ray"]) == ("error", "error", "ok")


def test_doctor_does_not_crash_without_packages(monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.startswith("triderm_dist.")]:
        if name.split(".")[1] in ("engine", "models"):
            monkeypatch.delitem(sys.modules, name)
    absent = ("torch", "accelerate", "timm", "open_clip", "psutil", "huggingface_hub", "rich")
    for name in [name for name in sys.modules if name.split(".")[0] in absent]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *rest, **named):
        if name.split(".")[0] in absent:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(importlib, "import_module", lambda name: without(name) and sys.modules[name])
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path}", f"data.source={tmp_path}"])
    sections = examine(experiment)
    assert {each.name for each in errors(sections)} >= {"training"}
    assert any("psutil" in each.advice for each in sections["machine"])
    assert any("without torch" in each.text for each in sections["experiment"])
    print_findings(sections)
    assert "error    training: " in capsys.readouterr().out
