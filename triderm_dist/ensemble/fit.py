"""After cross-validation: stacker, ensemble and honest scores from oof.parquet, and their use on a test set.

Files in a run's folder: stack.ubj + stack.json (the stacker; with wide columns also stack.safetensors, and
turns.safetensors for fused features), ensemble.json (members, weights, thresholds, rule and
all scores), ensemble_oof.parquet (what the nested ensemble and stacker said about each lesion), oof_submission.csv (the
nested decisions in the official format).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from triderm_dist import metrics, submission
from triderm_dist.config import Experiment
from triderm_dist.ensemble import calibration
from triderm_dist.ensemble.alignment import fit_turns, save_turns
from triderm_dist.ensemble.artifact import FITTED, MEAN, with_temperatures
from triderm_dist.ensemble.columns import BATCH, ColumnFile, Columns
from triderm_dist.ensemble.run_files import (
    ENSEMBLE_FILE,
    NESTED_FILE,
    OOF_FILE,
    STACK_FILE,
    SUBMISSION_FILE,
    TURNS_FILE,
)
from triderm_dist.ensemble.score_table import Row, _nested_tau
from triderm_dist.ensemble.stack_inputs import (
    column_names,
    stack_features,
    stacker_columns,
)
from triderm_dist.ensemble.stacker import (
    STACKER,
    NestedStack,
    Stacker,
    fit_stacker,
    in_own_process,
    inner_folds,
    keep_what_gains,
    nested_stack,
    remove_stacker,
)
from triderm_dist.ensemble.thresholds import best_thresholds, decide
from triderm_dist.ensemble.weights import CHOSEN, NestedEstimate, choose, fit_candidates, nested_estimate
from triderm_dist.files import atomic_path
from triderm_dist.predictions import OofTable, labeled, read_oof, read_predictions
from triderm_dist.schema import DataError


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
    usable = table.complete(models) & labeled(table)
    if not usable.all():
        notes.append(
            f"{(~usable).sum()} of {len(table)} lesions are left out: not labeled, or not predicted by every model"
        )
    table = table.take(usable)
    if len(np.unique(table.folds)) < 2:
        raise DataError(
            f"{run_folder / OOF_FILE}: lesions predicted by every model lie in {len(np.unique(table.folds))} folds, "
            "two are needed; finish triderm crossval first"
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
        stack, stacker, tried = in_own_process(_fit_stack, run_folder, table, models, config)
        notes += tried

    def members_without(fold: int) -> dict[str, np.ndarray]:
        members = {model: _probabilities(table, model, nested_temperatures[fold][model]) for model in models}
        return members | ({STACKER: stack.without[fold]} if stack else {})

    members = {model: _probabilities(table, model, temperatures[model]) for model in models}
    if stack:
        members[STACKER] = stack.out_of_fold

    nested = nested_estimate(
        members_without,
        labels,
        folds,
        lambda fold: inner_folds(labels, table.groups, folds, folds != fold, seed),
        config.ensemble,
        seed,
        table.diagnoses,
    )
    candidates = fit_candidates(members, labels, folds, config.ensemble, seed, table.diagnoses)
    nested_scores = {way: metrics.macro_f1(nested.decisions[way], labels) for way in candidates}
    chosen = choose(nested_scores)
    final = with_temperatures(candidates[chosen].ensemble, temperatures)
    notes.append(_why(nested_scores, chosen))
    notes += [
        f"{model} kept the epoch that was best on the fold it predicts (train.select=best): its scores are too high"
        for model in models
        if model in config.models and config.models[model].train.select == "best"
    ]
    untouched = [members[name] if name == STACKER else _probabilities(table, name, 1.0) for name in members]

    def score(name: str, way: str) -> Row:
        own = candidates[way].ensemble if way in candidates else final
        combined = own.combine(list(members.values()))
        decisions = nested.decisions[way]
        fitted = decide(combined, best_thresholds(combined, labels), "any")
        # Fitted weights have seen these lesions. What was chosen outside each fold has not.
        weighed = way in (FITTED, CHOSEN)
        plain = None if weighed else own.combine(untouched)
        seen = nested.probabilities if way == CHOSEN else plain
        return Row(
            name=name,
            official=None if plain is None else metrics.official_macro_f1(plain, labels),
            argmax=None if seen is None else metrics.argmax_macro_f1(seen, labels),
            argmax_tau=_nested_tau(table, way) if way in models else None,
            fitted=metrics.macro_f1(fitted, labels),
            nested=metrics.bootstrap_interval(decisions, labels, config.ensemble.bootstrap, seed),
            less_than_chosen=metrics.paired_difference(
                nested.decisions[CHOSEN], decisions, labels, config.ensemble.bootstrap, seed
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
    ways = {way: {MEAN: "plain mean", FITTED: "fitted weights"}.get(way, way) for way in candidates}
    rows = [score(name, way) for way, name in ways.items()] + [score("ensemble", CHOSEN)]
    if stacker is None:
        remove_stacker(run_folder / STACK_FILE)  # of an earlier fit, with which this ensemble has nothing to do
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


def _write_nested(path: Path, table: OofTable, nested: NestedEstimate, stack: NestedStack | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    silent = np.full(nested.probabilities.shape, np.nan)
    columns = {
        "lesion_id": pa.array(table.lesion_ids, pa.string()),
        "fold": pa.array(table.folds),
        "label": pa.array(table.labels),
        "probabilities": pa.array(list(nested.probabilities)),
        "decisions": pa.array(list(nested.decisions[CHOSEN])),
        "stack": pa.array(list(stack.out_of_fold if stack else silent)),
    }
    with atomic_path(path) as beside:
        pq.write_table(pa.table(columns), beside, compression="zstd")


def _fit_stack(
    run_folder: Path, table: OofTable, models: tuple[str, ...], config: Experiment
) -> tuple[NestedStack, Stacker, list[str]]:
    """The nested stack, the stacker of all rows, and what to tell about extra columns that were tried."""
    names, notes = column_names(table, models), []
    known, settings = (table.labels, table.groups), (config.stack, config.seed)

    def nest(columns: Columns, extra: str = "") -> NestedStack:
        wide = columns.shape[1] - len(names)
        return nested_stack(columns, *known, table.folds, names, table.diagnoses, *settings, extra=extra, wide=wide)

    with TemporaryDirectory(prefix="triderm-columns-") as folder:
        columns = _columns(table, models, len(names), config.stack.memory_gb, Path(folder))
        nested = nest(columns)
        blocks: dict[str, Columns] = {"": columns}
        if config.stack.extra:
            if not isinstance(columns, np.ndarray):
                raise DataError("stack.extra works in memory only: raise stack.memory_gb, or leave it out")
            if "features" in config.stack.extra:
                files = [path for model in models for path in sorted(run_folder.glob(f"{model}/fold-*/test.parquet"))]
                save_turns(run_folder / TURNS_FILE, fit_turns([read_predictions(f) for f in files]))
            variants = {"": nested}
            for extra in config.stack.extra:
                blocks[extra] = stacker_columns(run_folder, extra, table, models)
                variants[extra] = nest(blocks[extra], extra)
            kept, nested, scores = keep_what_gains(variants, table.labels, table.folds)
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
        stacker = fit_stacker(
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
    if reserved := {STACKER, MEAN, FITTED, CHOSEN} & set(table.models):
        raise DataError(f"{path}: a model can't be called {min(reserved)!r}, the ensemble uses that name")
    return wanted or table.models


def _probabilities(table: OofTable, model: str, temperature: float) -> np.ndarray:
    return calibration.probabilities_of(table.logits[model] / temperature, table.heads[model])


def _temperature(table: OofTable, model: str, rows: np.ndarray) -> float:
    return calibration.fit_temperature(table.logits[model][rows], table.labels[rows], table.heads[model])


def _why(scores: dict[str, float], chosen: str) -> str:
    """scores: nested macro F1 of each way."""
    if len(scores) == 1:
        return "one member only: nothing to weigh"
    others = {way: score for way, score in scores.items() if way != FITTED}
    rival = max(others, key=lambda way: others[way])
    against = f"{'the plain mean' if rival == MEAN else rival} ({others[rival]:.3f})"
    fitted = f"{scores[FITTED]:.3f}"
    if chosen == FITTED:
        return f"fitted weights are used: they beat {against} with {fitted} nested"
    return f"the plain mean is used: fitted weights ({fitted}) do not beat {against} nested"
