"""Run trainings in sequence on all ranks, each resuming in its folder; rank R writes the results to relay-R.json.

A job is {"config": FILE, "settings": [...], "folds": [0] by default, "stop": rank or null}: that rank requests a stop
after the first epoch.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

from triderm_dist.cli import Interrupted
from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.crossval import run_folds
from triderm_dist.schema import Busy, InputError


def request_stop(requested: bool, epoch: int, scores: dict[str, float]) -> None:
    if requested:
        os.kill(os.getpid(), signal.SIGTERM)


def main(output: str, jobs: str) -> None:
    rank, results = int(os.environ.get("RANK", "0")), []
    for job in json.loads(jobs):
        experiment = load(Experiment, job.get("config"), job["settings"])
        on_validation = partial(request_stop, job.get("stop") == rank)
        try:
            index = read_index(experiment.train_shards)
            run_folds(experiment, index, list(experiment.models), job.get("folds", [0]), on_validation)
            results.append("done")
        except (Interrupted, InputError, Busy, OSError) as error:
            results.append(f"{type(error).__name__}: {error}")
        Path(output, f"relay-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
