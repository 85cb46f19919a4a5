"""Running statistics of batch norms are updated once per step, whatever happens in between."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.engine.batch_norm import RunningStatistics


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_a_step_follow_the_mean_of_its_micro_batches(momentum):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum))
    frozen = network[2].eval()
    plain, accelerator = copy.deepcopy(network), Accelerator(cpu=True)
    statistics, names = RunningStatistics(network), [name for name, _ in network.named_buffers()]
    for _ in range(2):
        batches = torch.randn(2, 4, 3)
        with statistics.of_step(accelerator, 2):
            network(batches[0])  # a first pass
            for batch in batches:
                statistics.rewind()
                network(batch)
                statistics.add()
                network(batch)  # as activation checkpointing does
        each = [copy.deepcopy(plain) for _ in batches]
        for one, batch in zip(each, batches, strict=True):
            one(batch)
        for name, mean in plain.named_buffers():
            mean.copy_(torch.stack([dict(one.named_buffers())[name].float() for one in each]).mean(0))
        assert [name for name, _ in network.named_buffers()] == names
        for (name, found), expected in zip(network.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, expected, msg=name)
    assert int(network[1].num_batches_tracked) == 2 and int(frozen.num_batches_tracked) == 0


def test_statistics_are_those_from_before_where_a_step_fails():
    network = nn.Sequential(nn.BatchNorm1d(3))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with pytest.raises(RuntimeError, match="no memory"), RunningStatistics(network).of_step(Accelerator(cpu=True), 1):
        network(torch.randn(4, 3))
        raise RuntimeError("no memory")
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
