"""Write a small SYNTHETIC data set of a task: generated lesions, with a test set and its labels.

OUTPUT/train is a folder with labels, OUTPUT/test one without, OUTPUT/truth holds the labels of the test set. milk10k.py
writes the official layout of that challenge, table.py a table with the columns of any other task.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from triderm_dist.files import check_no_mount, follow_link, naming_file, new_folder, resolve_dots
from triderm_dist.schema import DataError, Task
from triderm_dist.tasks import load_task

LESIONS, TEST_LESIONS = 600, 260
README = """SYNTHETIC DEMO DATA. NOT A MEDICAL DATA SET.

Every picture, score and label here was generated from random numbers by a program (triderm-dist, data/synthetic).
It shows no patient and no lesion, and a score on these data says nothing about real skin. The layout is that of
{title}, so that every program can be tried.

train/   tables and photos with labels
test/    tables and photos without labels
truth/   the labels of test/, to score predictions
"""


def is_synthetic(source: str | os.PathLike[str]) -> bool:
    """Return whether a notice in a folder of photos, or next to it, declares them synthetic."""
    notices = (Path(source) / "attribution.txt", Path(source).parent / "README.txt")
    return any(path.is_file() and path.read_bytes().startswith(b"SYNTHETIC") for path in notices)


def write_synthetic(output: Path, task: Task, lesions: int, test_lesions: int, seed: int) -> bool:
    """Write the synthetic data into `output` atomically; returns False if `output` holds the same data already.

    Raises DataError if `output` holds other files, ConfigError if there are too few lesions for the diagnoses.
    """
    if task.reader == "milk10k":
        from triderm_dist.data.synthetic.milk10k import write_part
    else:
        from triderm_dist.data.synthetic.table import write_part

    settings = f"settings: lesions={lesions} test_lesions={test_lesions} seed={seed}"
    if task != load_task("milk10k"):
        settings += f" task={json.dumps(task.to_mapping())}"
    if _is_written(output, settings):
        return False
    output = follow_link(resolve_dots(output))
    check_no_mount(output)
    with new_folder(output) as temporary:
        if _is_written(output, settings):  # by another process in the meantime
            return False
        train, test, truth = (temporary / name for name in ("train", "test", "truth"))
        for folder in (train, test, truth):
            folder.mkdir(parents=True)
        with naming_file(output):
            write_part(train, train, task, "Training", lesions, minimum=6, seed=(seed, 0))
            write_part(test, truth, task, "Test", test_lesions, minimum=3, seed=(seed, 1))
            text = README.format(title=task.title or task.name)
            (temporary / "README.txt").write_text(f"{text}\n{settings}\n", encoding="utf-8")
        temporary.rename(output)
    return True


def _is_written(output: Path, settings: str) -> bool:
    """Return whether an output holds the data of these settings. Raises DataError for other files."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    readme = output / "README.txt"
    if readme.is_file() and settings in readme.read_text(encoding="utf-8", errors="replace").splitlines():
        return True
    raise DataError(f"{output}: exists and is not this synthetic data; choose another output folder or delete it")


def truth_file(output: Path, task: Task) -> Path:
    """The table with the labels of the test set."""
    return output / "truth" / ("MILK10k_Test_GroundTruth.csv" if task.reader == "milk10k" else "lesions.csv")
