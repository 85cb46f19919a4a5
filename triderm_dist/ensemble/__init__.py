"""Everything after cross-validation: the stacker, ensemble weights, thresholds, and their use on a test set."""

from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.ensemble.thresholds import best_thresholds
from triderm_dist.ensemble.weights import fit_weights

__all__ = ["Ensemble", "best_thresholds", "fit_weights"]
