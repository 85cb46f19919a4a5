"""Prediction files, and the out-of-fold table on which everything after training is fitted.

One row holds the outputs of one model for one lesion. The model of a fold writes `predictions.parquet` (the lesions of
its fold, which it was not trained on) and `test.parquet`; `gather` merges the former of all folds and models and
raises for files that would leak training rows.

Shapes: N lesions, C diagnoses, K concepts, M metadata fields, D features.
"""

from triderm_dist.predictions.files import (
    PredictionFile,
    predicted_by,
    predictions_writer,
    read_predictions,
    read_transforms,
    write_predictions,
)
from triderm_dist.predictions.gathering import DataSplit
from triderm_dist.predictions.oof import (
    PARTS,
    OofFile,
    average_test,
    concatenate_tables,
    find_predictions,
    gather,
    gather_part,
    part_folder,
    read_oof,
    write_gathered,
    write_oof,
)
from triderm_dist.predictions.rows import (
    NO_FOLD,
    TEST,
    OofTable,
    Predictions,
    labeled,
    row_slice,
    rows_of,
)

__all__ = [
    "NO_FOLD",
    "PARTS",
    "TEST",
    "DataSplit",
    "OofFile",
    "OofTable",
    "PredictionFile",
    "Predictions",
    "average_test",
    "concatenate_tables",
    "find_predictions",
    "gather",
    "gather_part",
    "labeled",
    "part_folder",
    "predicted_by",
    "predictions_writer",
    "read_oof",
    "read_predictions",
    "read_transforms",
    "row_slice",
    "rows_of",
    "write_gathered",
    "write_oof",
    "write_predictions",
]
