"""Train one fold of one model, and predict its held-out lesions.

triderm train --config EXPERIMENT.yaml fold=0
triderm ranks --config_file ddp -m train --config EXPERIMENT.yaml fold=0
accelerate launch --config_file ddp.yaml -m triderm_dist.commands.train --config EXPERIMENT.yaml fold=0

The first trains on one device, the second on all GPUs of a node, the third does the same with Accelerate's launcher.
"""

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import CONFIG_FILE, TRAINING, Experiment, save
from triderm_dist.environment import record_data
from triderm_dist.runtime.terminal import wrapped


class TrainRun(Experiment):
    uses = TRAINING

    model: str | None = Field(None, description="the model of `models` to train; null takes the first")
    fold: int = Field(0, ge=0, description="the held-out fold, which is validated on and predicted")

    @property
    def is_stage(self) -> bool:
        return True


def main(config: TrainRun) -> None:
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.collectives import is_main
    from triderm_dist.doctor.preflight import check_training, lesions_of
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.extra_sets import open_extra_sets
    from triderm_dist.engine.fold import data_facts, model_config
    from triderm_dist.engine.fold_results import fold_results, fold_table
    from triderm_dist.schema import ConfigError

    if config.fold >= config.data.folds:
        raise ConfigError(f"fold={config.fold}: data.folds is {config.data.folds}, folds count from 0")
    name = config.model or next(iter(config.models))
    model_config(config, name)
    verify = config.data.verify and is_main()
    index = open_index(config.train_shards, config.data.remote, verify=verify)
    open_extra_sets(config, index, verify=verify)  # refuses a wrong map before anything is done
    check_training(config, lesions_of(index))
    folder = config.fold_folder(name, config.fold)

    def save_settings() -> None:
        save(config, folder / CONFIG_FILE)
        if not (config.folder / CONFIG_FILE).exists():  # else those of the whole run
            save(config.experiment, config.folder / CONFIG_FILE)
        record_data(config.folder, "train", data_facts(config, index))

    run_folds(config, index, [name], [config.fold], on_start=save_settings)
    if is_main():
        print(fold_table(fold_results(config, [name], [config.fold])))
        print(wrapped(f"weights and predictions are in {folder}"))


def start() -> None:
    run(TrainRun, main, __doc__, users=programs_using, on_ranks=lambda config: True)


if __name__ == "__main__":
    start()
