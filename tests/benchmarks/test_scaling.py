"""The model of several GPUs against what others have published."""

import re
from dataclasses import replace

import pytest

from benchmarks.scaling import (
    CLUSTERS,
    NVLINK,
    Cluster,
    Network,
    efficiency,
    exchanges,
    h100_nodes,
    sent,
    smallest_micro_batch,
    step_seconds,
)
from tests.processes import ROOT

BASE = Network(117_400_000, 15_000_000, 72_400_000, 16, 0.0054, 0.000487, 0.45, 640)


def test_zero_sends_as_the_paper_says():
    """Rajbhandari and others 2020, section 7: stages 1 and 2 as much as plain data parallelism, stage 3 half again.

    With 16-bit gradients and weights; DeepSpeed all-reduces the gradients of stages 1 and 2
    (github.com/deepspeedai/DeepSpeed/discussions/5560), where a reduce-scatter would do.
    """
    network = replace(BASE, frozen=0)
    plain = sent(exchanges("DDP", network, 2), 64)
    assert sent(exchanges("ZeRO 3", network, 2), 64) == pytest.approx(1.5 * plain)
    gathered = sent(exchanges("ZeRO 1, 2", network, 2)[1:], 64)
    assert sent(exchanges("ZeRO 1, 2", network, 2), 64) - gathered == pytest.approx(plain)
    assert 2 * gathered == pytest.approx(plain)


def test_ring_and_tree_on_two_nodes():
    """16 V100 on two nodes with one network of 100 Gb/s: 1 GB took 268 ms as a ring, 134 ms as NCCL's tree (NVIDIA,
    nccl-tests issue 22). The bandwidth from the ring predicts the tree.
    """
    ring = 2 * 15 / 16 * 1e9 / 0.268
    two = Cluster(2, 8, NVLINK, ring, 0.0)
    assert two.seconds("all-reduce", 1e9) == pytest.approx(0.134, rel=0.1)
    assert replace(two, nodes=3, gpus=5).seconds("all-reduce", 1e9) == pytest.approx(0.268, rel=0.01)


def test_large_all_reduce_in_a_node():
    """Eight H100: 350 to 360 GB/s of ring bandwidth (NVIDIA, nccl issue 1281)."""
    seconds = h100_nodes(1).seconds("all-reduce", 8e9)
    assert 345e9 < 2 * 7 / 8 * 8e9 / seconds < 365e9


def test_resnet_on_256_gpus():
    """Goyal and others 2017: 100 MB of gradients, 32 images a P100, backward pass 120 ms, servers of eight with one NIC
    of 50 Gb/s: about 90% from 8 to 256 GPUs, and 12.8 Gb/s needed at least. The model does not know late ranks.
    """
    network = Network(25_000_000, 2_000_000, 0, 50, 0.0, 0.18 / 32, 1 / 3, 32)
    servers = h100_nodes(32, nics=1, gbit=50, latency=160e-6)
    assert 0.9 < efficiency(network, 32, "DDP", servers) / efficiency(network, 32, "DDP", h100_nodes(1)) < 1
    needed = sent(exchanges("DDP", network), 256) * 8 / 0.125 / 1e9
    assert needed == pytest.approx(12.8, rel=0.01)
    slow = h100_nodes(32, nics=1, gbit=needed * 0.8, latency=160e-6)
    assert efficiency(network, 32, "DDP", slow) < 0.9


def test_communication_that_fits_into_the_backward_pass_costs_its_last_bucket():
    cluster = replace(h100_nodes(2), latency=0.0)
    lesions = 10_000
    waited = step_seconds(BASE, lesions, "DDP", cluster) - BASE.step - lesions * BASE.lesion
    buckets = -(-4 * BASE.trained // (25 * 2**20))
    assert waited == pytest.approx(cluster.seconds("all-reduce", 4 * BASE.trained / buckets), rel=1e-6)
    smaller = step_seconds(BASE, lesions, "DDP", cluster, bucket_mb=5) - BASE.step - lesions * BASE.lesion
    assert smaller < 0.25 * waited


def test_communication_alone_where_there_is_nothing_to_compute():
    cluster = replace(h100_nodes(8), latency=0.0)
    waited = step_seconds(BASE, 1e-9, "DDP", cluster) - BASE.step
    assert waited == pytest.approx(cluster.seconds("all-reduce", 4 * BASE.trained), rel=1e-6)
    assert step_seconds(BASE, 1e-9, "DDP", cluster, gradient=2) - BASE.step == pytest.approx(waited / 2, rel=1e-6)


@pytest.mark.parametrize("strategy", ["DDP", "FSDP2", "ZeRO 1, 2", "ZeRO 3"])
def test_smallest_micro_batch_keeps_90_percent(strategy):
    cluster = h100_nodes(2, nics=1, gbit=100)
    fewest = smallest_micro_batch(BASE, strategy, cluster)
    assert efficiency(BASE, fewest, strategy, cluster) >= 0.9 > efficiency(BASE, fewest - 1, strategy, cluster)


@pytest.mark.parametrize("file", ["docs/clusters.md", "launch/slurm/train.sh", "launch/kubernetes/nodes.yaml"])
def test_examples_for_two_nodes_keep_90_percent_over_one_network_card(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(r"train.global_batch=(\d+),? train.micro_batch=(\d+),? train.gradient_precision=(\w+)", text)
    assert found and text.count("train.micro_batch=") == len(found)
    for batch, lesions, precision in found:
        assert int(batch) == 16 * int(lesions) and precision == "bf16"
        assert efficiency(BASE, int(lesions), "DDP", CLUSTERS["16 GPUs, one 100 Gb/s NIC per node"], 2) > 0.9
