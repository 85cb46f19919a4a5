"""Measure for a minute how fast this machine trains an experiment's network: lesions/s, MFU, memory, data wait.

triderm bench --config EXPERIMENT.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml -m triderm_dist.commands.bench --config EXPERIMENT.yaml

Uses the training's own step and loader, random weights, and data.shards or, without them, synthetic photos of data.task
(MILK10k's by default). Compares with the record in benchmarks/results/bench.json of the same task, model, batch and
device.
"""

import tempfile
from functools import partial
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import TRAINING, Experiment, shipped
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.settings import PathText

COMMITTED = shipped("benchmarks") / "bench.json"


class BenchRun(Experiment):
    uses = (*TRAINING, "data.short_side", "data.task")

    model: str | None = Field(None, description="the model of `models` to train; null takes the first")
    seconds: float = Field(60.0, gt=0, description="seconds to measure, after warming up")
    record: PathText | None = Field(
        None, description="file of records to add the result to, such as a copy of bench.json"
    )


def main(config: BenchRun) -> None:
    from triderm_dist.data.shards.index import read_index
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed import parallel
    from triderm_dist.distributed.collectives import on_main
    from triderm_dist.engine import bench, cpu_precision
    from triderm_dist.engine.extra_towers import open_extra_towers
    from triderm_dist.engine.fold import add_trained_parts, model_config, new_network
    from triderm_dist.engine.model_inputs import open_inputs
    from triderm_dist.engine.model_tower import training_tower
    from triderm_dist.tasks import load_task, milk10k_task

    if config.record:
        bench.read_records(Path(config.record))  # refuse a bad file before measuring, not after
    name = config.model or next(iter(config.models))
    named = model_config(config, name)
    model = named.model_copy(update={"tower": named.tower.model_copy(update={"pretrained": False})})
    train, folder = model.train, config.folder / "bench"
    accelerator = parallel.start_training(train)
    if config.data.shards:
        index = open_index(config.train_shards, config.data.remote)
    else:
        lesions, side = max(128, 2 * train.global_batch), config.data.short_side or 288
        task = load_task(config.data.task) if config.data.task else milk10k_task()
        shards = folder / f"{task.name}-{lesions}x{side}"
        if accelerator.is_main_process:
            bench.synthetic_shards(shards, lesions, side, task)
        accelerator.wait_for_everyone()
        index = read_index(shards)
    experiment = config.model_copy(update={"tokens": str(folder / "tokens")})
    extra = open_extra_towers(experiment, name, index, accelerator)
    model_inputs = open_inputs(
        experiment, model, index, accelerator, training_tower(experiment, model, index, extra=extra)
    )
    network = add_trained_parts(new_network(model, model_inputs), model, index.task).to(accelerator.device)
    if cpu_precision.is_measured(train, accelerator):
        with tempfile.TemporaryDirectory() as kept:  # the choice of this machine, today
            precision, why = on_main(partial(cpu_precision.choose, network, train.micro_batch, Path(kept)))
        if accelerator.is_main_process:
            print(wrapped(f"precision {precision} ({why.partition(';')[0]})"))
        train = train.model_copy(update={"precision": precision})
        model, accelerator = model.model_copy(update={"train": train}), parallel.start_training(train)
    values = bench.measure(model, network, model_inputs.loaders, accelerator, config.seconds, seed=config.seed)
    if accelerator.is_main_process:
        record = bench.record_of(model, index.task, accelerator, values)
        print(bench.comparison(record, bench.find_comparable(bench.read_records(COMMITTED), record)))
        if config.record:
            bench.add_record(Path(config.record), record)


def start() -> None:
    run(BenchRun, main, __doc__, users=programs_using, on_ranks=lambda config: True)


if __name__ == "__main__":
    start()
