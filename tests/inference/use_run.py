"""Predict photos, explain a lesion, report and export: python -m tests.inference.use_run RUN PHOTOS RESULTS."""

from __future__ import annotations

import sys

from triderm_dist.cli import read_settings
from triderm_dist.commands import export, predict, report


def use(run: str, photos: str, results: str) -> None:
    predict.main(read_settings(predict.PredictRun, [f"run={run}", f"input={photos}", f"output={results}/predicted"]))
    words = [f"run={run}", "explain=[lesion-00003]", f"output={results}/explained"]
    predict.main(read_settings(predict.PredictRun, words))
    report.main(read_settings(report.ReportRun, [f"run={run}", f"output={results}/reported"]))
    export.main(read_settings(export.ExportRun, [f"run={run}", f"output={results}/run.zip"]))


if __name__ == "__main__":
    use(*sys.argv[1:])
