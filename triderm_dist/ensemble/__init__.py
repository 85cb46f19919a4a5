"""Everything after cross-validation: the stacker, ensemble weights, thresholds, and their use on a test set."""

from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.ensemble.fitted_stacker import STACKERS
from triderm_dist.ensemble.stacker import Stacker, TrainingRows
from triderm_dist.ensemble.thresholds import best_thresholds
from triderm_dist.ensemble.weights import fit_weights

__all__ = ["STACKERS", "Ensemble", "Stacker", "TrainingRows", "best_thresholds", "fit_weights"]
