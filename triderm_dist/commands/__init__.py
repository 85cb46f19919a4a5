"""The programs of the toolkit, one module each: parse the settings, call the library, print.

The console script `triderm` runs them by name. launch/, shards/ and tune/ of a clone hold entry points of the same
names for `python -m` and for accelerate. A program is a module of this package with a function `start`, and a line in
`PROGRAMS`.
"""

import importlib
import os
import signal
import sys
import threading
from types import FrameType

from triderm_dist.runtime.signals import INTERRUPTED, SIGNALS

PROGRAMS: dict[str, dict[str, str]] = {
    "Start here": {
        "demo": "make synthetic lesions and run the pipeline on them",
        "doctor": "check this machine, the settings and the data before a run",
        "config": "list and copy the experiments, search spaces and accelerate files that ship with the package",
    },
    "Data": {
        "download": "download the official MILK10k files",
        "task": "describe a folder of photos as a task.yaml, and check what a task reads",
        "pack": "pack a photo folder into WebDataset shards with an index",
        "index": "write the index of WebDataset shards made elsewhere",
        "join": "join packed sets of one task, or take a part of one",
        "verify": "check shards: checksums, index, every photo",
        "synthetic": "write a small synthetic data set of a task",
    },
    "Training": {
        "pipeline": "run every stage: pack, cross-validate, stack, predict, report",
        "train": "train one fold of one model",
        "crossval": "train all folds and gather the out-of-fold predictions",
        "search": "search settings with Ray Tune",
        "results": "summarize a search: table, best settings, page with plots",
        "bench": "measure the training throughput of this machine",
        "refit": "train one network per model on all labeled lesions, for cheap prediction",
        "ranks": "`accelerate launch` with this toolkit's exit codes and signal handling",
    },
    "After training": {
        "embed": "extract embeddings of the pretrained tower as extra stacker columns",
        "stack": "fit the stacker and the ensemble on the out-of-fold predictions",
        "predict": "predict the test set and write the submission",
        "report": "write report.html",
        "compare": "compare runs on the same lesions: paired differences, settings that differ",
        "runs": "list the runs in a folder with score, date and size",
        "clean": "remove what a run does not need to predict, after showing how much",
        "export": "write a run as a zip file, as a folder for the hub, or its networks as ONNX",
    },
}
"""Every program by group, with one line of help."""


def names() -> list[str]:
    """Return the names of all programs."""
    return [name for group in PROGRAMS.values() for name in group]


def programs_using(key: str) -> list[str]:
    """Return the programs on which a dotted setting of the experiment has an effect."""
    from triderm_dist.config import Experiment, has_effect

    found = []
    for name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Experiment)]
        if any("uses" in vars(kind) and has_effect(kind, key) for kind in kinds if kind is not Experiment):
            found.append(name)
    return found


def _exit_interrupted(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted: rerun the same command to resume\n")
    os._exit(INTERRUPTED)


def _exit_on_signals() -> None:
    """Exit with 3 on signals to stop while the modules of a program are imported; `cli` then takes over.

    This package is the first that a program imports. Other handlers are left as they are, and ignored signals ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit_interrupted)
    # Ctrl-C only where Python looks for one of these modules (`-m`), or runs a script: others keep their own handling.
    if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_interrupted)


def _is_program() -> bool:
    """Return whether this process was started as one of the programs."""
    if not sys.argv:
        return False
    folder, name = os.path.split(os.path.abspath(sys.argv[0]))
    return sys.argv[0] == "-m" or name == "triderm" or os.path.basename(folder) in _ENTRY_POINTS


_ENTRY_POINTS = ("commands", "triderm_dist", "launch", "shards", "tune")
_exit_on_signals()
