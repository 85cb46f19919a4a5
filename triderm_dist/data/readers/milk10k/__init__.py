"""Read a MILK10k challenge folder into checked lesions. Validates every row; does not read pixels.

An invalid table is refused at once. Problems of single lesions are collected over the whole folder, so that one run
lists all of them; then the folder is refused, or these lesions are dropped.

Supported layouts, by the names of their tables (any case; in the folder itself, or one folder below it):

    MILK10k_Training_Metadata.csv, MILK10k_Training_GroundTruth.csv, MILK10k_Training_Input/LESION/PHOTO.jpg
    MILK10k_Test_Metadata.csv, MILK10k_Test_Input/LESION/PHOTO.jpg          (labels are not needed)
    supplements/training_input.csv, supplements/training_gt.csv, images/PHOTO.jpg      (zip of the ISIC Archive)
    metadata.csv, images/PHOTO.jpg

Photos are found by name at any depth below `*_Input` or `images`, so a folder may be nested twice. Tables may have any
delimiter and encoding that `table` reads. The supplement holds label information, and is read only where the task has
finer labels.

Diagnoses, fields, and the words of views and missing values are those of the task; the names of the other columns are
the challenge's.
"""

from triderm_dist.data.readers.milk10k.columns import (
    CONCEPT_PREFIX,
    CONCEPTS,
    GROUP_COLUMN,
    MONET_COLUMNS,
    UNUSED_COLUMNS,
)
from triderm_dist.data.readers.milk10k.labels import read_labels
from triderm_dist.data.readers.milk10k.layout import find_parts, has_layout, inputs
from triderm_dist.data.readers.milk10k.read import read_challenge

__all__ = [
    "CONCEPTS",
    "CONCEPT_PREFIX",
    "GROUP_COLUMN",
    "MONET_COLUMNS",
    "UNUSED_COLUMNS",
    "find_parts",
    "has_layout",
    "inputs",
    "read_challenge",
    "read_labels",
]
