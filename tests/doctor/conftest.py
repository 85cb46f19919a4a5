"""A small experiment, and helpers that run the doctor on it."""

import subprocess

import pytest

from tests.processes import launch
from triderm_dist.config import Experiment
from triderm_dist.doctor import data, examine
from triderm_dist.doctor.findings import Finding

SMALL = ["models.a.tower.source=timm:test_efficientnet", "models.a.tower.pretrained=false"]


@pytest.fixture(autouse=True)
def short_reading_test(monkeypatch):
    monkeypatch.setattr(data, "READING_SECONDS", 0.1)


def finding(experiment: Experiment, name: str, ranks: int = 1) -> Finding:
    sections = examine(experiment, ranks)
    return next(each for section in sections.values() for each in section if each.name == name)


FROZEN = [*SMALL, "models.a.tower.frozen=true"]
"""The same with a frozen tower, for subprocesses: estimating the memory of a step is faster."""


def run_doctor(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return launch("launch.doctor", *words, check=False, environment=environment)
