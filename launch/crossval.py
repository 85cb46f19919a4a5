"""Train all folds of all models, then gather what each model says about lesions it never saw into oof.parquet.

accelerate launch --config_file accelerate_configs/ddp.yaml -m launch.crossval --config EXPERIMENT.yaml
"""

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Experiment, save


class CrossvalRun(Experiment):
    only: tuple[str, ...] | None = Field(None, description="train these models only; null trains all of `models`")


def main(config: CrossvalRun) -> None:
    from triderm_dist.data.cache import open_index
    from triderm_dist.engine.crossval import folds_of, model_named, run_folds
    from triderm_dist.engine.parallel import is_main
    from triderm_dist.oof import gather, write_oof

    names = config.only or tuple(config.models)
    for name in names:
        model_named(config, name)
    index = open_index(config.train_shards, config.data.remote, verify=config.data.verify and is_main())
    if is_main():
        save(Experiment(**config.model_dump(exclude={"only"})), config.folder / "config.yaml")
    run_folds(config, index, names, range(config.data.folds))
    if is_main():
        table = gather(
            config.folder, tuple(config.models), index.lesion_ids.tolist(), index.labels, folds_of(index, config.data)
        )
        write_oof(config.folder / "oof.parquet", table)
        print(f"{len(table)} lesions by {len(table.models)} models in {config.folder / 'oof.parquet'}")


if __name__ == "__main__":
    run(CrossvalRun, main, __doc__)
