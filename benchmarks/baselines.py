"""Compare the networks and their ensemble with simple baselines: same lesions, same folds, paired differences.

python -m benchmarks.baselines run=RUN

RUN is a finished cross-validation (`triderm crossval`, `triderm stack`) with a frozen tower. The baselines are (a)
XGBoost on metadata and concepts; (b) logistic regression on pooled embeddings of the frozen tower plus metadata and
concepts, and XGBoost on 64 principal components of the embeddings plus the same; (c) the network `mlp` on the same
embeddings, metadata and concepts, one training and the mean of three, which are trained into RUN/baselines. Every
method is scored at p > 0.5, by argmax, with thresholds tuned on the lesions they are scored on, and nested: thresholds
fitted on the other folds. Intervals are over lesions. The last line is one JSON object: what the ensemble and the best
network gain over the best baseline of each letter, with the low end of the interval.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from benchmarks.nested import nested_decisions
from triderm_dist import intervals, metrics
from triderm_dist.cli import run
from triderm_dist.config import Experiment, build
from triderm_dist.ensemble.calibration import probabilities_of
from triderm_dist.ensemble.run_files import NESTED_FILE, OOF_FILE, read_nested
from triderm_dist.ensemble.thresholds import best_thresholds, decide
from triderm_dist.predictions import DataSplit, OofTable, gather, read_oof
from triderm_dist.schema import ConfigError

COMPONENTS = 64
MLP = {
    "kind": "mlp",
    "width": 128,
    "dropout": 0.3,
    "seeds": 3,
    "train": {
        "epochs": 10,
        "global_batch": 64,
        "micro_batch": 64,
        "trackers": [],
        "sampling": {"kind": "shuffle"},
        "augment": {"clinical_dropout": 0.1, "concept_dropout": 0.1},
        "loss": {"focal_weight": 1.0, "soft_f1_weight": 0.0, "gamma": 1.0},
        "optim": {"lr": 2e-3, "warmup_epochs": 1, "min_lr": 1e-6},
    },
}
"""The MLP of the baselines; its numbers do not depend on those of the run."""
STRENGTHS = (1e-3, 1e-2)
"""C (1 / penalty) of logistic regression on standardized columns; the better one counts, in the baseline's favor."""


def main(config: Experiment) -> None:
    table = read_oof(config.folder / OOF_FILE)
    nested_rows = read_nested(config.folder / NESTED_FILE)
    if not np.array_equal(nested_rows.lesion_ids, table.lesion_ids):
        raise ConfigError(
            f"{config.folder}: ensemble_oof.parquet holds other lesions than oof.parquet; run triderm stack again"
        )
    tabular = tabular_columns(table)
    everything = np.concatenate([pooled_embeddings(config, table), tabular], axis=1)

    probabilities = {"(a) XGBoost, metadata + concepts": out_of_fold(boosted(), tabular, table)}
    for strength in STRENGTHS:
        probabilities[f"(b) logistic regression, C={strength:g}"] = out_of_fold(linear(strength), everything, table)
    reduced = reduced_then_boosted(everything.shape[1] - tabular.shape[1])
    probabilities[f"(b) XGBoost, {COMPONENTS} components"] = out_of_fold(reduced, everything, table)
    probabilities |= mlp(config, table)
    baselines = tuple(probabilities)
    for model in table.models:
        probabilities[model] = probabilities_of(table.logits[model], table.heads[model])
    nested = {name: nested_decisions(p, table, config) for name, p in probabilities.items()}
    probabilities["(e) ensemble"], nested["(e) ensemble"] = nested_rows.probabilities, nested_rows.decisions
    print_scores(probabilities, nested, baselines, table, config)


def tabular_columns(table: OofTable) -> np.ndarray:
    """Return (N, F) concepts, numbers, one-hot categories; a missing number is NaN, a missing category all zeros."""
    fields = [
        values[:, None] if field.is_number else values[:, None] == np.arange(len(field.categories))[None]
        for field, values in zip(table.task.fields, table.metadata.T, strict=True)
    ]
    return np.concatenate([table.concepts, *fields], axis=1).astype(np.float32)


def pooled_embeddings(config: Experiment, table: OofTable) -> np.ndarray:
    """Return (N, 2 width) mean tokens of both views by the first frozen tower of the settings, in order of `table`."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.embed import embeddings

    index = open_index(config.train_shards, config.data.remote)
    row_of = {str(lesion): row for row, lesion in enumerate(index.lesion_ids)}
    return embeddings(config, index, first_frozen(config))[0][[row_of[str(lesion)] for lesion in table.lesion_ids]]


def first_frozen(config: Experiment) -> str:
    """Return the first model with a frozen tower. Raises ConfigError where there is none."""
    frozen = [name for name, model in config.models.items() if model.tower.frozen]
    if not frozen:
        raise ConfigError("models: none has tower.frozen=true; the baselines need embeddings of an untouched tower")
    return frozen[0]


def mlp(config: Experiment, table: OofTable) -> dict[str, np.ndarray]:
    """Train the folds of the MLP that are not trained yet; return (N, C) probabilities of one seed and of their mean.

    Its tower is that of the first model with a frozen one, without what `init` fills it with.
    """
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.fold import assigned_folds

    raw = config.model_dump(mode="json")
    model = {**MLP, "tower": raw["models"][first_frozen(config)]["tower"]}
    raw |= {"output": str(config.folder / "baselines"), "tokens": str(config.token_folder), "models": {"mlp": model}}
    experiment = build(Experiment, {**raw, "train": {}})
    index = open_index(config.train_shards, config.data.remote)
    run_folds(experiment, index, list(experiment.models), range(experiment.data.folds))
    data = DataSplit(index.lesion_ids, index.labels, assigned_folds(index, experiment.data))
    trained = gather(experiment.folder, tuple(experiment.models), data)
    row_of = {str(lesion): row for row, lesion in enumerate(trained.lesion_ids)}
    rows = [row_of[str(lesion)] for lesion in table.lesion_ids]
    seeds = [probabilities_of(trained.logits[name][rows], trained.heads[name]) for name in trained.models]
    return {"(c) MLP": seeds[0], f"(c) MLP, mean of {len(seeds)} seeds": np.mean(seeds, 0)}


def boosted() -> Any:
    from xgboost import XGBClassifier

    return XGBClassifier(n_estimators=150, max_depth=4, learning_rate=0.1, subsample=0.8, n_jobs=1)


def linear(strength: float) -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression(C=strength, max_iter=300))


def reduced_then_boosted(embedding_width: int) -> Any:
    from sklearn.compose import make_column_transformer
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline

    reduce = (PCA(COMPONENTS, random_state=0), slice(0, embedding_width))
    return make_pipeline(make_column_transformer(reduce, remainder="passthrough"), boosted())


def out_of_fold(model: Any, columns: np.ndarray, table: OofTable) -> np.ndarray:
    """Return (N, C) probabilities of each fold by a model fitted on the other folds."""
    result = np.zeros((len(table), len(table.diagnoses)))
    for fold in np.unique(table.folds):
        inside = table.folds == fold
        present, codes = np.unique(table.labels[~inside], return_inverse=True)
        model.fit(columns[~inside], codes)
        result[np.ix_(inside, present)] = model.predict_proba(columns[inside])
    return result


def print_scores(
    probabilities: dict[str, np.ndarray],
    nested: dict[str, np.ndarray],
    baselines: tuple[str, ...],
    table: OofTable,
    config: Experiment,
) -> None:
    """Print the scores of every method and the gains over the baselines, and as the last line the JSON object."""
    labels, resamples = table.labels, config.ensemble.bootstrap

    def gain(name: str, over: str) -> intervals.Interval:
        return intervals.macro_f1_difference(nested[name], nested[over], labels, table.groups, resamples, config.seed)

    print(f"{len(table)} lesions, {len(np.unique(table.folds))} folds; macro F1, 95% intervals over lesions")
    print(f"{'':<36} p > 0.5  argmax   tuned  nested                 final model minus this")
    for name, p in probabilities.items():
        tuned = metrics.macro_f1(decide(p, best_thresholds(p, labels), "any"), labels)
        interval = intervals.macro_f1(nested[name], labels, table.groups)
        print(
            f"{name:<36} {metrics.official_macro_f1(p, labels):7.3f} {metrics.argmax_macro_f1(p, labels):7.3f} "
            f"{tuned:7.3f}  {interval!s:<22} {gain('(e) ensemble', name)}"
        )
    best = max(table.models, key=lambda model: metrics.macro_f1(nested[model], labels))
    result: dict[str, Any] = {"best_network": best}
    for who, name in (("ensemble", "(e) ensemble"), ("network", best)):
        for label in sorted({baseline[1] for baseline in baselines}):
            group = [baseline for baseline in baselines if baseline[1] == label]
            over = max(group, key=lambda baseline: metrics.macro_f1(nested[baseline], labels))
            difference = gain(name, over)
            print(f"{name} minus {over}: {difference}")
            result |= {
                f"{who}_vs_{label}": round(difference.value, 4),
                f"{who}_vs_{label}_low": round(difference.low, 4),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    run(Experiment, main, __doc__)
