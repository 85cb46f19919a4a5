"""The settings of a run, as one typed tree; settings.py parses, validates and describes such trees.

`Experiment` is the tree, with one module for each of its parts. A program adds settings of its own in a subclass, and
declares in `uses` which settings of the experiment have an effect on it; programs that need no experiment declare a
smaller `Section`.
"""

from triderm_dist.config.data import (
    DataConfig,
    ExtraSetConfig,
    Groups,
    Invalid,
    MissingView,
    RemoteConfig,
    Threads,
    slice_of,
)
from triderm_dist.config.ensemble import EnsembleConfig, OofConfig, PredictConfig, ReportConfig, StackConfig
from triderm_dist.config.experiment import (
    INFERENCE,
    PARALLEL_FOLDS_KEYS,
    TRAINING,
    Experiment,
    Extensible,
    Networks,
    ParallelFoldsRun,
    RunReader,
    has_effect,
)
from triderm_dist.config.hashes import stable_dump
from triderm_dist.config.limits import MAX_BATCH, MAX_SECONDS, MAX_SEED
from triderm_dist.config.loading import build, import_plugins, load, load_run, read_yaml
from triderm_dist.config.model import (
    RESERVED_MODELS,
    ExtraTowerConfig,
    Frame,
    LoraConfig,
    ModelConfig,
    TowerConfig,
    mean_of_seeds,
    seed_names,
    seeds_of_models,
)
from triderm_dist.config.paths import CONFIG_DIR, absolute_path, map_paths
from triderm_dist.config.saving import CONFIG_FILE, as_yaml, save
from triderm_dist.config.shipped_files import find_file, first_comment, shipped, shipped_names
from triderm_dist.config.training import (
    COSMETIC,
    EXECUTION,
    AugmentConfig,
    LossConfig,
    OptimConfig,
    SamplingConfig,
    TermConfig,
    TrainConfig,
)

__all__ = [
    "CONFIG_DIR",
    "CONFIG_FILE",
    "COSMETIC",
    "EXECUTION",
    "INFERENCE",
    "MAX_BATCH",
    "MAX_SECONDS",
    "MAX_SEED",
    "PARALLEL_FOLDS_KEYS",
    "RESERVED_MODELS",
    "TRAINING",
    "AugmentConfig",
    "DataConfig",
    "EnsembleConfig",
    "Experiment",
    "Extensible",
    "ExtraSetConfig",
    "ExtraTowerConfig",
    "Frame",
    "Groups",
    "Invalid",
    "LoraConfig",
    "LossConfig",
    "MissingView",
    "ModelConfig",
    "Networks",
    "OofConfig",
    "OptimConfig",
    "ParallelFoldsRun",
    "PredictConfig",
    "RemoteConfig",
    "ReportConfig",
    "RunReader",
    "SamplingConfig",
    "StackConfig",
    "TermConfig",
    "Threads",
    "TowerConfig",
    "TrainConfig",
    "absolute_path",
    "as_yaml",
    "build",
    "find_file",
    "first_comment",
    "has_effect",
    "import_plugins",
    "load",
    "load_run",
    "map_paths",
    "mean_of_seeds",
    "read_yaml",
    "save",
    "seed_names",
    "seeds_of_models",
    "shipped",
    "shipped_names",
    "slice_of",
    "stable_dump",
]
