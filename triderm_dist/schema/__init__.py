"""The data types shared by all modules: tasks, diagnoses, views, concepts, metadata fields, batches, outputs, errors.

Reads no file and imports nothing heavy. Letters of shapes, used throughout: B lesions in a batch, C diagnoses, K
concepts, M metadata fields, L tokens, D width, H x W pixels.
"""

from triderm_dist.schema.batch import Batch, FineOutputs, Lesion, Outputs
from triderm_dist.schema.errors import Busy, CheckpointError, ConfigError, DataError, InputError, check_choice
from triderm_dist.schema.metadata import PLAIN_NUMBER, MetadataField
from triderm_dist.schema.task import (
    MISSING_WORDS,
    UNLABELED,
    VIEWS,
    ConceptColumns,
    Diagnosis,
    FineLabels,
    ReferenceResult,
    Signature,
    TableFormat,
    Task,
    TaskColumns,
    View,
)

__all__ = [
    "DIAGNOSES",
    "MISSING_WORDS",
    "PLAIN_NUMBER",
    "UNLABELED",
    "VIEWS",
    "Batch",
    "Busy",
    "CheckpointError",
    "ConceptColumns",
    "ConfigError",
    "DataError",
    "Diagnosis",
    "FineLabels",
    "FineOutputs",
    "InputError",
    "Lesion",
    "MetadataField",
    "Outputs",
    "ReferenceResult",
    "Signature",
    "TableFormat",
    "Task",
    "TaskColumns",
    "View",
    "check_choice",
]

DIAGNOSES: tuple[str, ...] = (
    "AKIEC",
    "BCC",
    "BEN_OTH",
    "BKL",
    "DF",
    "INF",
    "MAL_OTH",
    "MEL",
    "NV",
    "SCCKA",
    "VASC",
)
"""The 11 diagnoses of MILK10k, in the order of the official ground truth and of the submission."""
