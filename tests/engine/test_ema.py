"""Averages of weights: exponential over steps, uniform over the last epochs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from triderm_dist.config import TrainConfig
from triderm_dist.engine.ema import Ema, EpochAverage
from triderm_dist.schema import ConfigError
from triderm_dist.settings import validate


def set_weight(network: nn.Linear, value: float) -> None:
    with torch.no_grad():
        network.weight.fill_(value)


def test_ema_follows_the_formula() -> None:
    network = nn.Linear(1, 1, bias=False)
    set_weight(network, 0.0)
    average, expected = Ema(network, 0.5), 0.0
    for step in range(1, 6):
        set_weight(network, float(step))
        average.after_step(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.swapped_in():
        assert network.weight.item() == pytest.approx(expected)
    assert network.weight.item() == 5.0


def test_epoch_average_is_the_mean_of_the_last_epochs_and_counts_each_once() -> None:
    network = nn.Linear(1, 1, bias=False)
    average, found = EpochAverage(network, 2), []
    for epoch in range(1, 6):
        set_weight(network, 10.0 * epoch)
        average.after_epoch(epoch)
        resumed = EpochAverage(network, 2)
        resumed.load(average.state())
        resumed.after_epoch(epoch)  # saved while it validated
        average = resumed
        with average.swapped_in():
            found.append(network.weight.item())
    assert found == pytest.approx([10, 20, 30, 35, 40])


def test_two_averages_are_refused() -> None:
    with pytest.raises(ConfigError, match="two averages"):
        validate(TrainConfig, {"ema_decay": 0.9, "swa_epochs": 2})
    with pytest.raises(ConfigError, match="more than epochs"):
        validate(TrainConfig, {"epochs": 2, "swa_epochs": 3})
