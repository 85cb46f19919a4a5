"""Fit the stacker and the ensemble on OUTPUT/oof.parquet, and estimate them on lesions they were not fitted on.

triderm stack run=RUN

Writes stack.json with the stacker's model (stack.ubj for XGBoost), ensemble.json, ensemble_oof.parquet, and the results
of the out-of-fold lesions as CSV (oof_submission.csv, or oof_probabilities.csv and oof_decisions.csv) into OUTPUT.
Running it again writes the same files. README.md is the model card of the run.
"""

from __future__ import annotations

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import Experiment
from triderm_dist.runtime.terminal import wrapped

IN_TERMINAL = ("official", "argmax", "argmax_tau", "nested", "interval")
"""Columns of the score table that fit 80 characters; the report shows all."""


class StackRun(Experiment):
    uses = ("plugins", "output", "seed", "stack", "ensemble")

    @property
    def is_stage(self) -> bool:
        return True


def main(config: StackRun) -> None:
    from rich.console import Console
    from rich.table import Table

    from triderm_dist.ensemble.fit import fit_ensemble
    from triderm_dist.ensemble.model_card import write_card
    from triderm_dist.ensemble.run_files import ENSEMBLE, ENSEMBLE_FILE
    from triderm_dist.ensemble.score_table import COLUMNS, SHOWN

    fit = fit_ensemble(config.folder, config)
    write_card(config)
    table = Table(title=f"Macro F1 over {fit.lesions} out-of-fold lesions", title_justify="left")
    table.add_column("")
    shown = [name for name in SHOWN[fit.decision] if name in IN_TERMINAL]
    for name in shown:
        table.add_column(COLUMNS[name], justify="right", no_wrap=True)
    for row in fit.rows:
        cells = row.cells()
        table.add_row(row.title, *(cells[name] for name in shown), style="bold" if row.name == ENSEMBLE else None)
    Console(highlight=False).print(table)
    for note in fit.notes:
        print(wrapped(note, first="- "))
    print(wrapped(f"wrote {config.folder / ENSEMBLE_FILE}"))
    if set(config.train.trackers) - {"tensorboard"}:  # else PyTorch is not imported
        from triderm_dist.monitoring.tracking import log_scores

        scores = {f"nested macro F1/{row.name}": row.nested.value for row in fit.rows}
        log_scores(config.folder, scores, config.train)


def start() -> None:
    run(StackRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
