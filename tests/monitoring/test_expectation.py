"""What a training is expected to take on a GPU, and what the heads of the experiment files say of it."""

import pytest

from benchmarks.expected import HEAD, expected_heads
from tests.monitoring.test_memory_estimate import model, network_of
from triderm_dist.config import TrainConfig, find_file
from triderm_dist.monitoring.expectation import MFU, MFU_OF_CONVOLUTIONS, Expectation, expect
from triderm_dist.monitoring.flops import TrainingCompute
from triderm_dist.monitoring.memory_estimate import MemoryEstimate


def test_expectation_follows_from_memory_flops_and_pixels() -> None:
    network, train = network_of(model()), TrainConfig(global_batch=8, micro_batch=8)
    compute = TrainingCompute(2e9, 100e12, 2, "as set")
    found = expect(network, train, compute, True, "ddp", (384, 288))
    memory = MemoryEstimate(network, train, True, 2, "ddp", (384, 288)).total(8)
    assert found.memory * 2**30 == pytest.approx(memory)
    assert found.mfu == MFU and found.lesions_per_s == pytest.approx(2 * MFU * 100e12 / 2e9)
    assert found.cores == pytest.approx(2 * found.lesions_per_s / 3750)
    cnn = network_of(model(kind="dual_cnn", tower={"source": "timm:resnet10t"}))
    without_photos = expect(cnn, train, compute, True)
    assert (without_photos.mfu, without_photos.cores) == (MFU_OF_CONVOLUTIONS, 0)
    assert "decode" in str(found) and "decode" not in str(without_photos)


def test_measured_speed_is_compared_with_the_expected_one() -> None:
    text = Expectation(memory=10.0, lesions_per_s=2000.0, mfu=0.4, cores=3).compare(11.0, 1500.0)
    assert text == "11.0 GiB (110% of what was expected) and 1,500 lesions/s (75% of what was expected)"


@pytest.mark.slow
def test_heads_of_experiment_files_say_what_is_expected() -> None:
    for name, lines in expected_heads().items():
        found = [line for line in find_file("experiments", name).read_text().splitlines() if line.startswith(HEAD)]
        assert found == lines, f"{name}: run python -m benchmarks.expected write=true"
