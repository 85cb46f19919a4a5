"""After cross-validation: stacker, ensemble and honest scores from oof.parquet, and their use on a test set.

Files in a run's folder: stack.ubj + stack.json (the stacker; with wide columns also stack.safetensors, and
turns.safetensors for fused features), ensemble.json (members, weights, thresholds, rule and
all scores), ensemble_oof.parquet (what the nested ensemble and stacker said about each lesion), oof_submission.csv (the
nested decisions in the official format).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from triderm_dist import align, calibration, ensemble, metrics, stacking, submission
from triderm_dist.columns import (
    BATCH,
    ColumnFile,
    Columns,
    column_names,
    embeddings_path,
    read_embeddings,
    stack_features,
)
from triderm_dist.config import Experiment
from triderm_dist.files import whole
from triderm_dist.predictions import NO_FOLD, OofTable, Predictions, labelled, read_oof, read_predictions
from triderm_dist.schema import DataError

STACK_FILE = "stack.ubj"
TURNS_FILE = "turns.safetensors"
ENSEMBLE_FILE = "ensemble.json"
OOF_FILE = "oof.parquet"
NESTED_FILE = "ensemble_oof.parquet"
SUBMISSION_FILE = "oof_submission.csv"
HELD_OUT_FILE = "heldout.json"


@dataclass(frozen=True)
class Row:
    """The scores of one way to decide, macro F1 on the out-of-fold lesions.

    official: probabilities cut at 0.5, nothing fitted (members and their plain mean).  argmax: the likeliest diagnosis,
    with weights and temperatures of the other folds where there are any.  argmax_tau: the same after logit adjustment
    with tau fitted on the other folds (networks only).  fitted: thresholds fitted on the very lesions they are scored
    on, too high by nature.  nested: all fitted on the other folds.
    """

    name: str
    official: float | None
    argmax: float | None
    argmax_tau: float | None
    fitted: float
    nested: metrics.Interval
    less_than_chosen: metrics.Interval

    def json(self) -> dict[str, Any]:
        return {
            **{key: getattr(self, key) for key in ("official", "argmax", "argmax_tau", "fitted")},
            "nested": self.nested.json(),
            "chosen_minus_this": self.less_than_chosen.json(),
        }


@dataclass(frozen=True)
class Fit:
    """What `fit_final` wrote, for a program to print."""

    rows: list[Row]
    chosen: str
    notes: list[str]
    device: str | None
    lesions: int


def fit_final(run_folder: Path, config: Experiment) -> Fit:
    """Fit stacker and ensemble on RUN/oof.parquet, estimate them nested over folds, write the files named above.

    Raises DataError where the table is unusable: fewer than two folds, or no lesion that every member has predicted.
    """
    run_folder = Path(run_folder)
    table = read_oof(run_folder / OOF_FILE, features="features" in config.stack.extra)
    models = _members(table, config.ensemble.members, run_folder / OOF_FILE)
    notes = []
    usable = table.complete(models) & labelled(table)
    if not usable.all():
        notes.append(
            f"{(~usable).sum()} of {len(table)} lesions are left out: not labelled, or not predicted by every model"
        )
    table = table.take(usable)
    if len(np.unique(table.folds)) < 2:
        raise DataError(
            f"{run_folder / OOF_FILE}: lesions predicted by every model lie in {len(np.unique(table.folds))} folds, "
            "two are needed; finish launch.crossval first"
        )
    labels, folds, seed = table.labels, table.folds, config.seed
    absent = [name for index, name in enumerate(table.diagnoses) if not (labels == index).any()]
    if absent:
        notes.append(f"no lesion has {', '.join(absent)}: left out of every score, never claimed")

    temperatures = {model: _temperature(table, model, np.ones(len(table), bool)) for model in models}
    nested_temperatures = {
        fold: {model: _temperature(table, model, folds != fold) for model in models}
        for fold in np.unique(folds).tolist()
    }
    stack = stacker = None
    if config.stack.enabled:
        stack, stacker, tried = stacking.in_own_process(_fit_stack, run_folder, table, models, config)
        notes += tried

    def members_without(fold: int) -> dict[str, np.ndarray]:
        members = {model: _probabilities(table, model, nested_temperatures[fold][model]) for model in models}
        return members | ({stacking.STACKER: stack.without[fold]} if stack else {})

    members = {model: _probabilities(table, model, temperatures[model]) for model in models}
    if stack:
        members[stacking.STACKER] = stack.out_of_fold

    nested = ensemble.nested_estimate(
        members_without,
        labels,
        folds,
        lambda fold: stacking.inner_folds(labels, table.groups, folds, folds != fold, seed),
        config.ensemble,
        seed,
        table.diagnoses,
    )
    candidates = ensemble.fit_candidates(members, labels, folds, config.ensemble, seed, table.diagnoses)
    nested_scores = {way: metrics.macro_f1(nested.decisions[way], labels) for way in candidates}
    chosen = ensemble.choose(nested_scores)
    final = ensemble.with_temperatures(candidates[chosen].ensemble, temperatures)
    notes.append(_why(nested_scores, chosen))
    notes += [
        f"{model} kept the epoch that was best on the fold it predicts (train.select=best): its scores are too high"
        for model in models
        if model in config.models and config.models[model].train.select == "best"
    ]
    untouched = [members[name] if name == stacking.STACKER else _probabilities(table, name, 1.0) for name in members]

    def score(name: str, way: str) -> Row:
        own = candidates[way].ensemble if way in candidates else final
        combined = own.combine(list(members.values()))
        decisions = nested.decisions[way]
        fitted = ensemble.decide(combined, ensemble.best_thresholds(combined, labels), "any")
        # Fitted weights have seen these lesions. What was chosen outside each fold has not.
        weighed = way in (ensemble.FITTED, ensemble.CHOSEN)
        plain = None if weighed else own.combine(untouched)
        seen = nested.probabilities if way == ensemble.CHOSEN else plain
        return Row(
            name=name,
            official=None if plain is None else metrics.official_macro_f1(plain, labels),
            argmax=None if seen is None else metrics.argmax_macro_f1(seen, labels),
            argmax_tau=_nested_tau(table, way) if way in models else None,
            fitted=metrics.macro_f1(fitted, labels),
            nested=metrics.bootstrap_interval(decisions, labels, config.ensemble.bootstrap, seed),
            less_than_chosen=metrics.paired_difference(
                nested.decisions[ensemble.CHOSEN], decisions, labels, config.ensemble.bootstrap, seed
            ),
        )

    pairs = [
        {
            "first": first,
            "second": second,
            "difference": metrics.paired_difference(
                nested.decisions[first], nested.decisions[second], labels, config.ensemble.bootstrap, seed
            ).json(),
        }
        for first, second in combinations(members, 2)
    ]
    ways = {way: {ensemble.MEAN: "plain mean", ensemble.FITTED: "fitted weights"}.get(way, way) for way in candidates}
    rows = [score(name, way) for way, name in ways.items()] + [score("ensemble", ensemble.CHOSEN)]
    if stacker is None:
        stacking.remove_stacker(
            run_folder / STACK_FILE
        )  # of an earlier fit, with which this ensemble has nothing to do
    if stacker is not None:
        stacker.save(run_folder / STACK_FILE)
        if stacker.absent:
            notes.append(f"the stacker had no row of {', '.join(stacker.absent)}")
    _write_nested(run_folder / NESTED_FILE, table, nested, stack)
    submission.write_submission(
        run_folder / SUBMISSION_FILE,
        table.lesion_ids.tolist(),
        nested.final,
        nested.thresholds,
        diagnoses=table.diagnoses,
    )
    final.save(
        run_folder / ENSEMBLE_FILE,
        lesions=len(table),
        folds=len(np.unique(folds)),
        scores={row.name: row.json() for row in rows},
        pairs=pairs,
        picks={str(fold): pick for fold, pick in nested.picks.items()},
        weights_of={model: sorted(set(table.hashes[model])) for model in models},
        device=stacker.device if stacker else None,
        rounds=stacker.rounds if stacker else None,
        bootstrap=config.ensemble.bootstrap,
        notes=notes,
    )
    return Fit(rows, final.weighting, notes, stacker.device if stacker else None, len(table))


def predict_final(
    run_folder: Path, table: OofTable, parts: Sequence[Predictions] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """((N, C) probabilities, (C,) thresholds) of a test set, in the order of `table.lesion_ids`.

    `table` is `oof.average_test` of every fold model's predictions, `parts` are these themselves; a diagnosis is
    claimed where its probability is strictly above its threshold: hand both to `submission.write_submission`. Raises
    DataError where stack.ubj or ensemble.json is missing or wants a model that the table has not.
    """
    run_folder = Path(run_folder)
    fitted = ensemble.Ensemble.load(run_folder / ENSEMBLE_FILE)
    models = [name for name in fitted.members if name != stacking.STACKER]
    check_weights(
        run_folder, ((name, part.model_hash[part.model == name]) for part in parts for name in sorted(set(part.model)))
    )
    for model in models:
        if model not in table.models:
            raise DataError(
                f"{run_folder / ENSEMBLE_FILE}: needs predictions of model {model!r}, "
                f"there are those of {', '.join(table.models)}"
            )
    if table.diagnoses != fitted.diagnoses:
        raise DataError(f"{run_folder / ENSEMBLE_FILE}: was fitted for other diagnoses than the test set names")
    members = []
    for name, temperature in zip(fitted.members, fitted.temperatures, strict=True):
        if name == stacking.STACKER:
            stacker = stacking.Stacker.load(run_folder / STACK_FILE)
            names = column_names(table, models)
            if names != stacker.feature_names[: len(names)]:
                raise DataError(f"{run_folder / STACK_FILE}: was fitted on other columns than the test set has")
            members.append(stacker.predict(stacker_columns(run_folder, stacker.extra, table, models, parts)))
        else:
            members.append(_probabilities(table, name, temperature))
    return fitted.final(members), fitted.thresholds


def check_weights(run_folder: Path, said: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raises DataError where predictions (models with the hashes of their weights) are by other weights than
    ensemble.json was fitted on.
    """
    known = ensemble.read_json(run_folder / ENSEMBLE_FILE)["weights_of"]
    for model, own in said:
        if model in known and not set(own) <= set(known[model]):
            raise DataError(
                f"{run_folder / ENSEMBLE_FILE}: was fitted on other weights of {model} than those that predict now; "
                "run launch.stack again"
            )


def stacker_columns(
    run_folder: Path,
    extra: str,
    table: OofTable,
    models: Sequence[str],
    parts: Sequence[Predictions] = (),
) -> np.ndarray:
    """(N, F) what a stacker reads about the lesions of an out-of-fold table, or of a test set with its `parts`.

    extra: the block at the end of each row, one of `stack.extra`, or "" for none.
    """
    columns = stack_features(table, models)[0]
    test = bool((table.folds == NO_FOLD).all())
    if extra == "embeddings":
        block, tower = read_embeddings(embeddings_path(run_folder, "test" if test else "train"), table.lesion_ids)
        if test and tower != (other := read_embeddings(embeddings_path(run_folder, "train"), np.empty(0))[1]):
            raise DataError(f"{run_folder}: embeddings of the test set are by {tower}, of training by {other}")
    elif extra == "features":
        turns = align.load_turns(run_folder / TURNS_FILE)
        block = (
            align.turned_mean(parts, table.lesion_ids, models, turns)
            if test
            else align.turned_rows(table, models, turns)
        )
    else:
        return columns
    return np.concatenate([columns, block], axis=1)


@dataclass(frozen=True)
class NestedRows:
    """ensemble_oof.parquet: (N,) ids, labels, folds; (N, C) probabilities of ensemble and stacker, and decisions."""

    lesion_ids: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    probabilities: np.ndarray
    decisions: np.ndarray
    stack: np.ndarray


def read_nested(path: Path) -> NestedRows:
    """Read what `fit_final` wrote. Raises DataError naming the file."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run launch.stack first") from None

    def wide(name: str) -> np.ndarray:
        return np.array(table[name].to_pylist())

    return NestedRows(
        lesion_ids=np.array(table["lesion_id"].to_pylist(), object),
        labels=table["label"].to_numpy(),
        folds=table["fold"].to_numpy(),
        probabilities=wide("probabilities"),
        decisions=wide("decisions"),
        stack=wide("stack"),
    )


def _write_nested(
    path: Path, table: OofTable, nested: ensemble.NestedEstimate, stack: stacking.NestedStack | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    silent = np.full(nested.probabilities.shape, np.nan)
    columns = {
        "lesion_id": pa.array(table.lesion_ids, pa.string()),
        "fold": pa.array(table.folds),
        "label": pa.array(table.labels),
        "probabilities": pa.array(list(nested.probabilities)),
        "decisions": pa.array(list(nested.decisions[ensemble.CHOSEN])),
        "stack": pa.array(list(stack.out_of_fold if stack else silent)),
    }
    with whole(path) as beside:
        pq.write_table(pa.table(columns), beside, compression="zstd")


def _fit_stack(
    run_folder: Path, table: OofTable, models: tuple[str, ...], config: Experiment
) -> tuple[stacking.NestedStack, stacking.Stacker, list[str]]:
    """The nested stack, the stacker of all rows, and what to tell about extra columns that were tried."""
    names, notes = column_names(table, models), []
    known, settings = (table.labels, table.groups), (config.stack, config.seed)

    def nest(columns: Columns, extra: str = "") -> stacking.NestedStack:
        wide = columns.shape[1] - len(names)
        return stacking.nested_stack(
            columns, *known, table.folds, names, table.diagnoses, *settings, extra=extra, wide=wide
        )

    with TemporaryDirectory(prefix="triderm-columns-") as folder:
        columns = _columns(table, models, len(names), config.stack.memory_gb, Path(folder))
        nested = nest(columns)
        blocks: dict[str, Columns] = {"": columns}
        if config.stack.extra:
            if not isinstance(columns, np.ndarray):
                raise DataError("stack.extra works in memory only: raise stack.memory_gb, or leave it out")
            if "features" in config.stack.extra:
                files = [path for model in models for path in sorted(run_folder.glob(f"{model}/fold-*/test.parquet"))]
                align.save_turns(run_folder / TURNS_FILE, align.fit_turns([read_predictions(f) for f in files]))
            variants = {"": nested}
            for extra in config.stack.extra:
                blocks[extra] = stacker_columns(run_folder, extra, table, models)
                variants[extra] = nest(blocks[extra], extra)
            kept, nested, scores = stacking.keep_what_gains(variants, table.labels, table.folds)
            told = ", ".join(f"{scores[extra]:.3f} with {extra}" for extra in config.stack.extra)
            notes.append(
                f"extra columns of the stacker, nested macro F1 by argmax: {scores['']:.3f} without, {told}; "
                + (f"{kept} are kept" if kept else "none is kept")
            )
        else:
            kept = ""
        # All rows leave none to stop on; the folds have shown how many rounds are good.
        rounds = int(np.median(list(nested.rounds.values())))
        wide = blocks[kept].shape[1] - len(names)
        stacker = stacking.fit_stacker(
            blocks[kept], *known, names, table.diagnoses, *settings, rounds=rounds, extra=kept, wide=wide
        )
    if kept != "features":
        (run_folder / TURNS_FILE).unlink(missing_ok=True)
    return nested, stacker, notes


def _columns(table: OofTable, models: tuple[str, ...], width: int, memory_gb: float, folder: Path) -> Columns:
    """The stacker's columns, in memory or, where they take more than it, in a parquet file in FOLDER."""
    if len(table) * width * 4 <= memory_gb * 2**30:
        return stack_features(table, models)[0]
    parts = (table.take(np.arange(start, min(start + BATCH, len(table)))) for start in range(0, len(table), BATCH))
    return ColumnFile.write(folder / "columns.parquet", (stack_features(part, models)[0] for part in parts))


def _members(table: OofTable, wanted: tuple[str, ...] | None, path: Path) -> tuple[str, ...]:
    for name in wanted or ():
        if name not in table.models:
            raise DataError(f"{path}: has no model {name!r} of ensemble.members; there are {', '.join(table.models)}")
    if reserved := {stacking.STACKER, ensemble.MEAN, ensemble.FITTED, ensemble.CHOSEN} & set(table.models):
        raise DataError(f"{path}: a model can't be called {min(reserved)!r}, the ensemble uses that name")
    return wanted or table.models


def _probabilities(table: OofTable, model: str, temperature: float) -> np.ndarray:
    return calibration.probabilities_of(table.logits[model] / temperature, table.heads[model])


def _temperature(table: OofTable, model: str, rows: np.ndarray) -> float:
    return calibration.fit_temperature(table.logits[model][rows], table.labels[rows], table.heads[model])


def _nested_tau(table: OofTable, model: str) -> float:
    """Argmax macro F1 with prior and tau of logit adjustment taken from the other folds."""
    logits = calibration.log_probabilities(table.logits[model], table.heads[model])
    adjusted = np.empty_like(logits)
    for fold in np.unique(table.folds):
        inside, outside = table.folds == fold, table.folds != fold
        prior = calibration.class_prior(table.labels[outside], len(table.diagnoses))
        tau = calibration.fit_tau(logits[outside], table.labels[outside], prior)
        adjusted[inside] = calibration.adjust_logits(logits[inside], prior, tau)
    return metrics.argmax_macro_f1(adjusted, table.labels)


def _why(scores: dict[str, float], chosen: str) -> str:
    """scores: nested macro F1 of each way."""
    if len(scores) == 1:
        return "one member only: nothing to weigh"
    others = {way: score for way, score in scores.items() if way != ensemble.FITTED}
    rival = max(others, key=lambda way: others[way])
    against = f"{'the plain mean' if rival == ensemble.MEAN else rival} ({others[rival]:.3f})"
    fitted = f"{scores[ensemble.FITTED]:.3f}"
    if chosen == ensemble.FITTED:
        return f"fitted weights are used: they beat {against} with {fitted} nested"
    return f"the plain mean is used: fitted weights ({fitted}) do not beat {against} nested"
