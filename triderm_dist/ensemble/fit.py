"""Fit the stacker and the ensemble on RUN/oof.parquet, and estimate their scores on held-out lesions.

Files written into the run folder: stack.json and the stacker's model (stack.ubj for XGBoost; with wide columns also
stack.safetensors, and turns.safetensors for fused features), ensemble.json (members, weights, thresholds,
rule and all scores), ensemble_oof.parquet (nested probabilities and decisions for each lesion), and the nested results
as CSV: oof_submission.csv in the format of the task's challenge, else oof_probabilities.csv and oof_decisions.csv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from triderm_dist import intervals
from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.config import Experiment, import_plugins, mean_of_seeds, seeds_of_models
from triderm_dist.data.threads import openmp_threads
from triderm_dist.ensemble.alignment import fit_alignments, save_alignments
from triderm_dist.ensemble.calibration import fit_temperature, member_probabilities
from triderm_dist.ensemble.columns import BATCH, ColumnFile, Columns
from triderm_dist.ensemble.fitted_stacker import (
    FittedStacker,
    fit_stacker,
    ignored_settings,
    remove_stacker,
    stacker_kind,
)
from triderm_dist.ensemble.nested_stack import NestedStack, choose_columns, inner_folds, nested_stack
from triderm_dist.ensemble.notes import biased_scores, explain_choice, explain_columns, seed_spread
from triderm_dist.ensemble.run_files import (
    ALIGNMENTS_FILE,
    CHOSEN,
    ENSEMBLE_FILE,
    NESTED_FILE,
    OOF_FILE,
    OOF_PREFIX,
    RESERVED,
    STACK_FILE,
    STACKER,
    STACKER_FILES,
    NestedRows,
    write_nested,
)
from triderm_dist.ensemble.sampling import search_rows
from triderm_dist.ensemble.score_table import ScoreRow, ScoreTable
from triderm_dist.ensemble.stack_inputs import base_columns, column_names, embedding_tower, training_columns
from triderm_dist.ensemble.stacker import TrainingRows
from triderm_dist.ensemble.stacker_process import run_in_child
from triderm_dist.ensemble.weights import FitOptions, NestedEstimate, check_use, fit_candidates, nested_estimate
from triderm_dist.ensemble.xgboost_stacker import import_xgboost_alone
from triderm_dist.files import file_sha256
from triderm_dist.predictions import OofTable, labeled, read_oof, read_predictions
from triderm_dist.schema import DataError
from triderm_dist.submission import Results, write_results


@dataclass(frozen=True)
class FitResult:
    """The result of `fit_ensemble`, for a program to print.

    chosen: the weighting that predicts.  decision: that of the task.  notes: one sentence each.
    """

    rows: list[ScoreRow]
    chosen: str
    decision: str
    notes: list[str]
    lesions: int


def fit_ensemble(run_folder: Path, config: Experiment) -> FitResult:
    """Fit stacker and ensemble on RUN/oof.parquet, estimate them nested over folds, write the files named above.

    Raises ConfigError for a stacker that does not exist, and DataError if the table is unusable: fewer than two
    folds, or no lesion that every member has predicted.
    """
    run_folder = Path(run_folder)
    stacker_kind(config.stack)
    table, models, notes = _read_table(run_folder / OOF_FILE, config)
    notes += ignored_settings(config.stack)

    stack = stacker = None
    if config.stack.enabled:
        sent = table if config.stack.extra else replace(table, hashes={})
        stack, stacker, stacker_notes = run_in_child(_fit_stacker, run_folder, sent, models, config)
        notes += stacker_notes

    nested = _nested_estimate(table, models, stack, config)
    temperatures = _temperatures(table, models, np.ones(len(table), bool), config.seed)
    members = {model: member_probabilities(table, model, temperatures[model]) for model in models}
    uncalibrated = {model: member_probabilities(table, model) for model in models}
    if stack:
        members[STACKER] = uncalibrated[STACKER] = stack.out_of_fold
    candidates = fit_candidates(members, table.labels, table.folds, _fit_options(table, models, config))
    choice = nested.choice
    chosen = choice.used if choice else next(iter(candidates))
    ensemble = candidates[chosen].ensemble.with_temperatures(temperatures)
    notes += explain_choice(choice, config.ensemble.use) if choice else ["a single member: no weights to fit"]
    notes += seed_spread(models, nested, table.labels, config)
    notes += biased_scores(models, config)
    if stacker and stacker.absent:
        notes.append(f"the stacker had no training row of {', '.join(stacker.absent)}")

    scores = ScoreTable(table, members, uncalibrated, candidates, nested, config.ensemble.bootstrap, config.seed)
    rows = scores.rows(ensemble)
    if stacker:
        stacker.save(run_folder / STACK_FILE, table.task)
    else:
        remove_stacker(run_folder / STACK_FILE)  # of an earlier fit
    _write_nested(run_folder, table, nested, stack)
    files = [run_folder / name for name in (*STACKER_FILES, NESTED_FILE)]
    alone = {model: [model] for model in models} | _seed_means(models, config)
    predicting = ensemble.of_networks(alone[chosen]) if chosen in alone else ensemble
    predicting.save(
        run_folder / ENSEMBLE_FILE,
        table.task,
        lesions=len(table),
        folds=len(np.unique(table.folds)),
        scores={row.name: row.json() for row in rows},
        pairs=scores.pairs(),
        choice=choice.json() if choice else None,
        picks={str(fold): pick for fold, pick in nested.picks.items()},
        weights_of={model: sorted(set(table.hashes[model])) for model in models},
        stacker=stacker.model.summary() if stacker else None,
        bootstrap=config.ensemble.bootstrap,
        notes=notes,
        files={path.name: file_sha256(path) for path in files if path.exists()},
        **({"embeddings_of": embedding_tower(run_folder).record} if stacker and stacker.extra == "embeddings" else {}),
    )
    return FitResult(rows, chosen, table.task.decision, notes, len(table))


def _read_table(path: Path, config: Experiment) -> tuple[OofTable, tuple[str, ...], list[str]]:
    """Read the lesions that every member has predicted, the members that are networks, and notes on what is missing."""
    table = read_oof(path, features="features" in config.stack.extra)
    _check_networks(path, table)
    models = _networks(table, config.ensemble.members, path)
    check_use(config, models)
    notes = []
    usable = table.complete(models) & labeled(table)
    if not usable.all():
        notes.append(
            f"{(~usable).sum()} of {len(table)} lesions are excluded: not labeled, or not predicted by every model"
        )
    table = table.take(usable)
    # Numbers in the order of the names: the same results, and sorted a hundred times faster.
    table = replace(table, groups=intervals.group_numbers(table.groups))
    if (folds := len(np.unique(table.folds))) < 2:
        raise DataError(
            f"{path}: lesions predicted by every model lie in {folds} {'fold' if folds == 1 else 'folds'}, two are "
            "needed; finish triderm crossval first"
        )
    absent = [name for index, name in enumerate(table.diagnoses) if not (table.labels == index).any()]
    if absent:
        notes.append(f"no lesion has {', '.join(absent)}: excluded from every score, never predicted")
    return table, models, notes


def _check_networks(path: Path, table: OofTable) -> None:
    """Raise DataError where the out-of-fold table has predictions by other networks than those in RUN/MODEL/fold-K."""
    for model in table.models:
        for fold in np.unique(table.folds):
            file = path.parent / model / f"fold-{fold}" / "fold.json"
            used = {*table.hashes[model][table.folds == fold]} - {""}
            try:
                weights = read_checked_json(file).get("weights")
            except FileNotFoundError:  # the table alone is enough
                continue
            except DamagedFile as error:
                raise DataError(f"{file}: {error}; delete {file.parent} and train this fold again") from None
            if used and used != {weights}:
                raise DataError(
                    f"{path}: was gathered from other networks than that in {file.parent}; run triderm crossval again"
                )


def _networks(table: OofTable, members: tuple[str, ...] | None, path: Path) -> tuple[str, ...]:
    """Return the models to combine: `ensemble.members`, or all. Raises DataError for unknown and reserved names."""
    for name in members or ():
        if name not in table.models:
            raise DataError(f"{path}: has no model {name!r} of ensemble.members; it has {', '.join(table.models)}")
    if reserved := set(RESERVED) & set(table.models):
        raise DataError(f"{path}: a model can't be named {min(reserved)!r}, which the ensemble uses; rename the model")
    return members or table.models


def _temperatures(table: OofTable, models: tuple[str, ...], rows: np.ndarray, seed: int) -> dict[str, float]:
    """Fit the temperature of each model on some rows (N,) bool, or on a sample of them (`search_rows`)."""
    rows = np.flatnonzero(rows)
    rows = rows[search_rows(table.labels[rows], seed)]
    return {
        model: fit_temperature(table.logits[model][rows], table.labels[rows], table.heads[model]) for model in models
    }


def _nested_estimate(
    table: OofTable, models: tuple[str, ...], stack: NestedStack | None, config: Experiment
) -> NestedEstimate:
    """Estimate the ensemble on each fold, with temperatures, stacker, weights and thresholds from the other folds."""
    labels, folds = table.labels, table.folds

    def members_without(fold: int) -> dict[str, np.ndarray]:
        temperatures = _temperatures(table, models, folds != fold, config.seed)
        members = {model: member_probabilities(table, model, temperatures[model]) for model in models}
        return members | ({STACKER: stack.without[fold]} if stack else {})

    def parts_without(fold: int) -> np.ndarray:
        return inner_folds(labels, table.groups, folds, folds != fold, config.seed)

    return nested_estimate(
        members_without, labels, folds, parts_without, _fit_options(table, models, config), table.groups
    )


def _fit_options(table: OofTable, models: tuple[str, ...], config: Experiment) -> FitOptions:
    return FitOptions(
        config.ensemble, config.seed, table.task.decision, list(seeds_of_models(config.models, models).values())
    )


def _write_nested(run_folder: Path, table: OofTable, nested: NestedEstimate, stack: NestedStack | None) -> None:
    """Write the nested probabilities and decisions of every lesion as parquet and as CSV."""
    rows = NestedRows(
        lesion_ids=table.lesion_ids,
        labels=table.labels,
        folds=table.folds,
        probabilities=nested.probabilities,
        decisions=nested.decisions[CHOSEN],
        stack=stack.out_of_fold if stack else np.full(nested.probabilities.shape, np.nan),
    )
    write_nested(run_folder / NESTED_FILE, rows)
    results = Results(table.lesion_ids.tolist(), nested.probabilities, nested.decisions[CHOSEN])
    write_results(run_folder, table.task, results, prefix=OOF_PREFIX)


def _fit_stacker(
    run_folder: Path, table: OofTable, models: tuple[str, ...], config: Experiment
) -> tuple[NestedStack, FittedStacker, list[str]]:
    """Fit the nested stack and the stacker of all rows; return them with notes on extra columns."""
    import_plugins(config.plugins)  # in a child process
    if not config.plugins:  # they may need its estimators
        import_xgboost_alone()
    stack, seed = config.stack, config.seed
    names = column_names(table, models)
    with TemporaryDirectory(prefix="triderm-columns-") as folder:
        rows = _training_rows(_load_columns(table, models, len(names), stack.memory_gb, Path(folder)), table, names)
        variants = {"": rows}
        if stack.extra and not rows.in_memory:
            raise DataError("stack.extra works in memory only; raise stack.memory_gb, or remove stack.extra")
        if "features" in stack.extra:
            files = [path for model in models for path in sorted(run_folder.glob(f"{model}/fold-*/test.parquet"))]
            save_alignments(run_folder / ALIGNMENTS_FILE, fit_alignments([read_predictions(path) for path in files]))
        for extra in stack.extra:
            columns = training_columns(run_folder, extra, table, models)
            variants[extra] = _training_rows(columns, table, names, extra)
        nested_stacks = {extra: nested_stack(each, table.folds, stack, seed) for extra, each in variants.items()}
        kept, nested, scores = choose_columns(nested_stacks, table.labels, table.folds)
        notes = [explain_columns(kept, scores)] if stack.extra else []
        # No held-out rows are left for early stopping: the number of rounds comes from the stackers of the folds.
        stackers = list(nested.stackers.values())
        stacker = fit_stacker(variants[kept], stack, seed, openmp_threads(), fold_stackers=stackers)
    if kept != "features":
        (run_folder / ALIGNMENTS_FILE).unlink(missing_ok=True)
    return nested, stacker, notes


def _load_columns(table: OofTable, models: tuple[str, ...], width: int, memory_gb: float, folder: Path) -> Columns:
    """Build the stacker's columns in memory, or in a parquet file in FOLDER where they exceed `memory_gb` GiB."""
    if len(table) * width * 4 <= memory_gb * 2**30:
        return base_columns(table, models)
    parts = (table.take(np.arange(start, min(start + BATCH, len(table)))) for start in range(0, len(table), BATCH))
    return ColumnFile.write(folder / "columns.parquet", (base_columns(part, models) for part in parts))


def _training_rows(columns: Columns, table: OofTable, names: tuple[str, ...], extra: str = "") -> TrainingRows:
    """Build the training rows of the full table. extra: the name of the columns after `names`."""
    return TrainingRows(
        source=columns,
        indices=np.arange(len(table)),
        labels=table.labels,
        groups=table.groups,
        names=names,
        diagnoses=table.diagnoses,
        extra=extra,
        wide=columns.shape[1] - len(names),
    )


def _seed_means(models: Sequence[str], config: Experiment) -> dict[str, list[str]]:
    """Return the networks whose mean is the mean of a model's seeds, by the name of that mean."""
    return {mean_of_seeds(name): seeds for name, seeds in seeds_of_models(config.models, models).items()}
