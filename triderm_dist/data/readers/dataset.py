"""What every reader returns."""

from __future__ import annotations

import re
from dataclasses import dataclass

from triderm_dist.data.problems import Problem
from triderm_dist.schema import Lesion, Task

# A lesion id names files in the shards, where WebDataset ends the key at the first dot.
LESION_ID = re.compile(r"[^\s./\\]{1,80}")


@dataclass(frozen=True)
class Dataset:
    """Checked lesions of one folder, in the order of its table.

    task: gives labels and metadata their meaning.  concepts: names of the K concept scores.  labeled: whether the
    folder has labels.  notes: what was tolerated, with counts.  problems: why lesions were dropped.
    """

    task: Task
    lesions: list[Lesion]
    concepts: tuple[str, ...]
    labeled: bool
    notes: list[str]
    problems: tuple[Problem, ...] = ()
