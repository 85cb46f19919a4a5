"""Quick settings of the ensemble stage, and synthetic members."""

from pathlib import Path

import numpy as np

from triderm_dist.config import EnsembleConfig, Experiment, StackConfig, load
from triderm_dist.schema import DIAGNOSES

QUICK = EnsembleConfig(bootstrap=100, rounds=10)


def experiment(folder: Path, **change) -> Experiment:
    quick = {"max_rounds": 14, "early_stopping": 4, "learning_rate": 0.4, "device": "cpu"}
    tree = {"output": str(folder), "ensemble": {"bootstrap": 100, "rounds": 8}, "stack": quick | change}
    return load(Experiment).model_copy(
        update={
            "output": str(folder),
            "ensemble": EnsembleConfig(**tree["ensemble"]),  # type: ignore[arg-type]
            "stack": StackConfig(**tree["stack"]),  # type: ignore[arg-type]
        }
    )


def members_of(labels: np.ndarray, skills: list[float], seed: int = 0) -> list[np.ndarray]:
    """Probabilities (N, C) of members: logits `skill` at the label, plus normal noise."""
    generator, C = np.random.default_rng(seed), len(DIAGNOSES)
    tables = []
    for skill in skills:
        logits = skill * np.eye(C)[labels] + generator.normal(size=(len(labels), C))
        tables.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return tables
