"""Fit the XGBoost stage and the ensemble on OUTPUT/oof.parquet, and estimate them on lesions they were not fitted on.

triderm stack --config RUN/config.yaml

Writes stack.ubj, ensemble.json, ensemble_oof.parquet and oof_submission.csv into OUTPUT. Running it again writes the
same files.
"""

from __future__ import annotations

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import Experiment


class StackRun(Experiment):
    uses = ("plugins", "output", "seed", "stack", "ensemble")


def main(config: StackRun) -> None:
    from rich.console import Console
    from rich.table import Table

    from triderm_dist.ensemble.fit import fit_final

    fit = fit_final(config.folder, config)
    table = Table(title=f"Macro F1 over {fit.lesions} out-of-fold lesions", title_justify="left")
    table.add_column("")
    for heading in ("p > 0.5", "argmax", "argmax, tau", "nested", "95%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in fit.rows:
        ensemble = row.name == "ensemble"
        table.add_row(
            row.name,
            *("" if value is None else f"{value:.3f}" for value in (row.official, row.argmax, row.argmax_tau)),
            f"{row.nested.value:.3f}",
            f"{row.nested.low:.3f} to {row.nested.high:.3f}",
            style="bold" if ensemble else None,
        )
    console = Console()
    console.print(table)
    for note in fit.notes:
        console.print(f"- {note}")
    if fit.device:
        console.print(f"- XGBoost ran on {fit.device}")
    console.print(f"written: {config.folder / 'ensemble.json'} and the files beside it")


def start() -> None:
    run(StackRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
