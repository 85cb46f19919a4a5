"""Train each model once more on all labeled lesions, so that one network per model predicts instead of one per fold.

triderm refit run=RUN
triderm ranks --config_file ddp -m refit run=RUN

It ends after the median epoch of the folds' weights. Then `triderm predict networks=refit` predicts with these networks
and the stacker and ensemble that were fitted on the folds, in a fraction of the time. No lesion is held out, so the
estimate remains that of the folds.
"""

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import TRAINING, Experiment
from triderm_dist.runtime.terminal import wrapped


class RefitRun(Experiment):
    uses = (*TRAINING, "ensemble.members")

    only: tuple[str, ...] | None = Field(
        None, description="refit these models only; null refits those that the ensemble needs"
    )

    @property
    def is_stage(self) -> bool:
        return True


def main(config: RefitRun) -> None:
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.collectives import is_main
    from triderm_dist.engine.extra_sets import open_extra_sets
    from triderm_dist.engine.refit import refit

    names = config.only or needed(config)
    verify = config.data.verify and is_main()
    index = open_index(config.train_shards, config.data.remote, verify=verify)
    open_extra_sets(config, index, verify=verify)  # refuses a wrong map before anything is done
    refit(config.experiment, index, names)
    if is_main():
        folders = ", ".join(str(config.refit_folder(name)) for name in names)
        print(wrapped(f"networks of all labeled lesions are in {folders}; predict with networks=refit"))
        print("no lesion was held out to measure them on: the estimate is that of the folds")


def needed(config: RefitRun) -> tuple[str, ...]:
    """Return the names of the models in ensemble.json; before it exists, of all that the ensemble may use."""
    from triderm_dist.ensemble.artifact import Ensemble
    from triderm_dist.ensemble.run_files import ENSEMBLE_FILE

    if not (config.folder / ENSEMBLE_FILE).is_file():
        return config.ensemble.members or tuple(config.models)
    members = Ensemble.load(config.folder / ENSEMBLE_FILE).members
    return tuple(name for name in config.models if name in members)


def start() -> None:
    run(RefitRun, main, __doc__, users=programs_using, on_ranks=lambda config: True)


if __name__ == "__main__":
    start()
