"""Thresholds fitted on single networks, applied to the mean of the fold networks, against those fitted on such means.

python -m benchmarks.fold_mean run=RUN [seeds=5]

A test set is predicted by the mean of the networks of all folds, but the out-of-fold predictions that temperature and
thresholds are fitted on are each by one network, whose scores are noisier. This program measures what that costs. It
holds out each fold of RUN (a cross-validation with a frozen tower) as a test set, trains an inner cross-validation of
an MLP (mean tokens of the tower, concepts, metadata) on the other lesions, fits on its out-of-fold predictions, and
predicts the held-out fold by the mean of the inner networks. Rows: one inner network; the mean of logits, which the
toolkit uses; the mean of probabilities; a vote of the decisions; thresholds fitted on the out-of-fold mean of all
seeds; and, as the reference that no training set offers, thresholds fitted on the means themselves, on the other
folds. Macro F1 with one decision per lesion, mean over seeds. Differences are to the mean of logits, intervals over
lesions and seeds. The last line is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from benchmarks.baselines import pooled_embeddings, tabular_columns
from triderm_dist import intervals, metrics
from triderm_dist.cli import run
from triderm_dist.config import Experiment
from triderm_dist.data.folds import assign_folds
from triderm_dist.ensemble.calibration import fit_temperature, probabilities_of
from triderm_dist.ensemble.run_files import OOF_FILE
from triderm_dist.ensemble.thresholds import decide, regularized_thresholds
from triderm_dist.predictions import OofTable, read_oof

INNER_FOLDS = 5
SHRINKAGE = 5.0
COMPONENTS, WIDTH, DROPOUT, EPOCHS, BATCH, LEARNING_RATE = 96, 128, 0.3, 10, 64, 2e-3

SINGLE, MEAN, VOTE = "one network", "mean of logits", "vote of the decisions"
MEAN_PROBABILITIES = "mean of probabilities"
SEED_MEANS = "mean of logits, thresholds of the mean of the seeds"
REFERENCE = "mean of logits, thresholds of such means (reference)"


class FoldMeanRun(Experiment):
    seeds: int = Field(5, ge=1, description="inner cross-validations of each held-out fold")


def main(config: FoldMeanRun) -> None:
    table = read_oof(config.folder / OOF_FILE)
    embeddings, tabular = pooled_embeddings(config, table), tabular_columns(table)
    views = np.split(embeddings, 2, axis=1)
    torch.set_num_threads(1)
    decisions: dict[str, np.ndarray] = {}
    means = np.zeros((config.seeds, len(table), len(table.diagnoses)))
    for fold in np.unique(table.folds):
        held_out = table.folds == fold
        logits = inner_logits(views, tabular, table, held_out, config)
        means[:, held_out] = [test.mean(0) for _, test in logits]
        for name, seed, decided in decide_held_out(logits, table.labels[~held_out]):
            decisions.setdefault(name, np.zeros((config.seeds, *means.shape[1:]), bool))[seed, held_out] = decided
    decisions[REFERENCE] = np.stack([refitted(mean, table) for mean in means])
    print_scores(decisions, table, config)


def inner_logits(
    views: list[np.ndarray], tabular: np.ndarray, table: OofTable, held_out: np.ndarray, config: FoldMeanRun
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each seed, return (out-of-fold logits (n, C) of the other lesions, logits (K, N - n, C) of `held_out`)."""
    training = np.flatnonzero(~held_out)
    parts = assign_folds(table.labels[training], table.groups[training], INNER_FOLDS, config.seed)
    result = []
    for repeat in range(config.seeds):
        out_of_fold = np.zeros((len(training), len(table.diagnoses)))
        test = []
        for part in range(INNER_FOLDS):
            inside = training[parts != part]
            logits = train_mlp(
                model_inputs(views, tabular, inside), table, inside, config.seed + repeat * INNER_FOLDS + part
            )
            out_of_fold[parts == part] = logits[training[parts == part]]
            test.append(logits[held_out])
        result.append((out_of_fold, np.stack(test)))
    return result


def model_inputs(views: list[np.ndarray], tabular: np.ndarray, training: np.ndarray) -> Tensor:
    """Return (N, F) float32: principal components of each view, scaled by the first; standardized columns, NaN as 0."""
    parts = []
    for view in views:
        centered = torch.from_numpy(view - view[training].mean(0)).float()
        values, vectors = torch.linalg.eigh(torch.cov(centered[training].T))
        parts.append(centered @ vectors[:, -COMPONENTS:] / values[-1].sqrt())
    mean, deviation = np.nanmean(tabular[training], axis=0), np.nanstd(tabular[training], axis=0)
    parts.append(torch.from_numpy(np.nan_to_num((tabular - mean) / deviation.clip(0.1))).float())
    return torch.cat(parts, dim=1)


def train_mlp(inputs: Tensor, table: OofTable, training: np.ndarray, seed: int) -> np.ndarray:
    """Train an MLP with the focal loss (gamma 1) on rows `training`; return (N, C) logits of all lesions."""
    torch.manual_seed(seed)
    rows, labels = torch.from_numpy(training), torch.from_numpy(table.labels)
    network = nn.Sequential(
        nn.Linear(inputs.shape[1], WIDTH), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, len(table.diagnoses))
    )
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    for _ in range(EPOCHS):
        for batch in rows[torch.randperm(len(rows))].split(BATCH):
            log_p = network(inputs[batch]).log_softmax(1).gather(1, labels[batch][:, None])
            loss = -((1 - log_p.exp()) * log_p).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        return network(inputs).double().numpy()


def decide_held_out(
    logits: list[tuple[np.ndarray, np.ndarray]], labels: np.ndarray
) -> Iterable[tuple[str, int, np.ndarray]]:
    """Yield (row of the table, seed, (N - n, C) decisions on the held-out fold)."""
    seeds = fit(np.mean([out_of_fold for out_of_fold, _ in logits], axis=0), labels)
    for seed, (out_of_fold, test) in enumerate(logits):
        temperature, thresholds = fit(out_of_fold, labels)
        each = probabilities_of(test.reshape(-1, test.shape[2]) / temperature, "softmax").reshape(test.shape)
        mean = probabilities_of(test.mean(0) / temperature, "softmax")
        votes = np.mean([decide(one, thresholds, "nearest") for one in each], axis=0)
        yield SINGLE, seed, decide(each[0], thresholds, "nearest")
        yield MEAN, seed, decide(mean, thresholds, "nearest")
        yield MEAN_PROBABILITIES, seed, decide(each.mean(0), thresholds, "nearest")
        yield VOTE, seed, metrics.argmax_decisions(votes + mean / (10 * INNER_FOLDS))  # equal votes: the more probable
        yield SEED_MEANS, seed, decide(probabilities_of(test.mean(0) / seeds[0], "softmax"), seeds[1], "nearest")


def refitted(means: np.ndarray, table: OofTable) -> np.ndarray:
    """Return (N, C) decisions on each fold with temperature and thresholds fitted on the means of the other folds."""
    decisions = np.zeros(means.shape, bool)
    for fold in np.unique(table.folds):
        inside = table.folds == fold
        temperature, thresholds = fit(means[~inside], table.labels[~inside])
        decisions[inside] = decide(probabilities_of(means[inside] / temperature, "softmax"), thresholds, "nearest")
    return decisions


def fit(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return (temperature, thresholds (C,))."""
    temperature = fit_temperature(logits, labels, "softmax")
    return temperature, regularized_thresholds(probabilities_of(logits / temperature, "softmax"), labels, SHRINKAGE)


def print_scores(decisions: dict[str, np.ndarray], table: OofTable, config: FoldMeanRun) -> None:
    """Print a row for each way, and as the last line what the reference and the seeds gain over the mean of logits."""
    gains: dict[str, intervals.Interval] = {}
    print(f"{len(table)} lesions, {INNER_FOLDS} inner folds, {config.seeds} seeds; macro F1, 95% intervals")
    for name, by_seed in decisions.items():
        score = np.mean([metrics.macro_f1(one, table.labels) for one in by_seed])
        gains[name] = intervals.mean_over_seeds(
            [
                intervals.macro_f1_difference(one, mean, table.labels, table.groups, config.ensemble.bootstrap, seed)
                for seed, (one, mean) in enumerate(zip(by_seed, decisions[MEAN], strict=True))
            ]
        )
        print(f"{name:<56} {score:.4f}" + ("" if name == MEAN else f"  {gains[name]}"))
    averaging, reference, seeds = -gains[SINGLE].value, gains[REFERENCE].value, gains[SEED_MEANS].value
    print(json.dumps({"averaging": round(averaging, 4), "refit": round(reference, 4), "seed_means": round(seeds, 4)}))


if __name__ == "__main__":
    run(FoldMeanRun, main, __doc__)
