"""train.deterministic: two trainings on one GPU give the same numbers."""

from pathlib import Path

import pytest
import torch

from tests.gpu.training import batches, create_trainer, settings, take_steps
from triderm_dist.distributed import parallel


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["trimodal", "dual_cnn"])
def test_trainings_are_equal_bit_for_bit(kind: str, precision: str, shards: Path, tmp_path: Path) -> None:
    experiment = settings(kind, "train.deterministic=true", f"train.precision={precision}")
    results = []
    try:
        for name in ("first", "second"):
            trainer = create_trainer(experiment, shards, tmp_path / name)
            assert torch.are_deterministic_algorithms_enabled()
            losses = take_steps(trainer, batches(trainer), 10)
            results.append((losses, [p.detach().cpu() for p in parallel.unwrap(trainer.training.wrapped).parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    (first, weights), (second, others) = results
    assert first == second
    assert all(torch.equal(weight, other) for weight, other in zip(weights, others, strict=True))
