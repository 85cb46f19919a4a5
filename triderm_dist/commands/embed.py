"""Extract embeddings of a model's pretrained tower, without fine-tuning, as additional columns for triderm stack.

triderm embed run=RUN
triderm ranks --config_file ddp -m embed run=RUN

Writes OUTPUT/embeddings.train.parquet and, with a test set, OUTPUT/embeddings.test.parquet. Then
`triderm stack run=RUN stack.extra=embeddings` keeps them if they improve the nested estimate.
"""

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import INFERENCE, Experiment


class EmbedRun(Experiment):
    uses = (*INFERENCE, "data.test")

    model: str | None = Field(None, description="the model of `models` whose tower to use; null takes the first")

    @property
    def is_stage(self) -> bool:
        return True


def main(config: EmbedRun) -> None:
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.collectives import is_main
    from triderm_dist.engine.embed import embeddings
    from triderm_dist.ensemble.stack_inputs import EmbeddingTower, embeddings_path, write_embeddings

    name = config.model or next(iter(config.models))
    sets = {"train": config.train_shards}
    if config.data.test or config.data.test_shards:
        sets["test"] = config.test_shards
    for split, shards in sets.items():
        index = open_index(shards, config.data.remote, verify=config.data.verify and is_main())
        values, tower = embeddings(config, index, name)
        if is_main():
            path = embeddings_path(config.folder, split)
            write_embeddings(path, index.lesion_ids.tolist(), values, EmbeddingTower(tower.source, tower.name))
            print(f"{path}: {len(values)} lesions, {values.shape[1]} numbers each")


def start() -> None:
    run(EmbedRun, main, __doc__, users=programs_using, on_ranks=lambda config: True)


if __name__ == "__main__":
    start()
