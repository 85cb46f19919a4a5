"""Write RUN/report.html, a self-contained page, and its figures, from the files that triderm stack wrote.

triderm report run=RUN
triderm report run=RUN output=FOLDER
triderm report run=RUN learning_curve=true

With output=FOLDER nothing is written into the run. With learning_curve=true the networks with a frozen tower are first
trained again on 25 and 50 percent of the training lesions of each fold, in about three quarters of the time of their
cross-validation; the page then says whether more lesions would help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import Experiment, RunReader

if TYPE_CHECKING:
    from triderm_dist.models.attention import AttentionMaps


class ReportRun(RunReader):
    uses = ("output", "report")

    learning_curve: bool = Field(
        False, description="first train networks with a frozen tower on parts of the lesions, into RUN/learning_curve"
    )

    @property
    def is_stage(self) -> bool:
        return self.results == self.folder


def main(config: ReportRun) -> None:
    from triderm_dist.ensemble.model_card import write_card
    from triderm_dist.ensemble.xgboost_stacker import import_xgboost_alone
    from triderm_dist.report import write_report

    if config.learning_curve:
        train_parts(config)
    if config.stack.enabled and not config.plugins:  # they may need its estimators
        import_xgboost_alone()
    attend = partial(attention, config.experiment) if config.report.attention else None
    print(write_report(config.folder, config.results, config.report.photos, attend))
    if config.results == config.folder:
        write_card(config)


def attention(experiment: Experiment, lesion_ids: Sequence[str]) -> Mapping[str, AttentionMaps]:
    """Return out-of-fold attention maps of lesions of the training set by id."""
    from triderm_dist.engine.explain import out_of_fold_attention  # imports torch

    return out_of_fold_attention(experiment, lesion_ids)


def train_parts(config: ReportRun) -> None:
    """Train networks of the run on parts of the lesions, for the learning curve."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.learning_curve import models_of_learning_curve, train_learning_curve

    models = models_of_learning_curve(config)
    index = open_index(config.train_shards, config.data.remote, verify=config.data.verify)
    train_learning_curve(config.experiment, index, models)


def start() -> None:
    run(ReportRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
