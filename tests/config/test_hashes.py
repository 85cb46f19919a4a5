"""Hashes of settings stay where a setting is added, and change with its value or its default."""

import re

import pytest

from triderm_dist.config import Experiment, ModelConfig, OptimConfig, TrainConfig, stable_dump
from triderm_dist.config.hashes import ADDED_KEYS, FIRST_KEYS
from triderm_dist.settings import Section, describe

HASHED_SECTIONS = ("data", "models", "oof", "stack", "ensemble", "predict")


class LargerOptim(OptimConfig):
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float | None = None


class Schedule(Section):
    kind: str = "cosine"


class LargerTrain(TrainConfig):
    optim: LargerOptim = LargerOptim()
    schedule: Schedule = Schedule()


class LargerModel(ModelConfig):
    train: LargerTrain = LargerTrain()


@pytest.mark.parametrize(
    "train",
    [
        {"optim": {"nesterov": True}},
        {"optim": {"betas": [0.9, 0.99]}},
        {"optim": {"momentum": 0.0}},
        {"schedule": {"kind": "linear"}},
    ],
)
def test_new_setting_changes_the_hash_only_if_not_the_default(train):
    before = stable_dump(ModelConfig(), "models.NAME")
    assert stable_dump(LargerModel(), "models.NAME") == before
    assert stable_dump(LargerModel.model_validate({"train": train}), "models.NAME") != before


def test_changed_default_changes_the_hash(monkeypatch):
    class OtherDefaults(OptimConfig):
        min_lr: float = 1e-6
        nesterov: bool = True

    path = "models.NAME.train.optim"
    before = stable_dump(OptimConfig(), path)
    assert stable_dump(OtherDefaults(nesterov=False), path) != before  # one of FIRST_KEYS
    monkeypatch.setitem(ADDED_KEYS, f"{path}.nesterov", False)
    assert stable_dump(OtherDefaults(min_lr=1e-7), path) != before
    assert stable_dump(OtherDefaults(min_lr=1e-7, nesterov=False), path) == before


def test_added_settings_are_listed_with_their_neutral_value():
    keys = {row[0] for row in describe(Experiment) if row[0].partition(".")[0] in HASHED_SECTIONS}
    # A mapping by name counts as one setting, and so does a list.
    keys = {re.sub(r"(.\.NAME\..*)\.NAME\..*|\[\].*", r"\1", key) for key in keys}
    assert keys >= FIRST_KEYS
    missing, unknown = keys - FIRST_KEYS - set(ADDED_KEYS), set(ADDED_KEYS) - keys
    assert not missing, f"list {sorted(missing)} in ADDED_KEYS, so that a later default differs from this one"
    assert not unknown, f"ADDED_KEYS lists {sorted(unknown)}, which are not settings"
