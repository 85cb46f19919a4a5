"""Retry of a fold after an out-of-memory error."""

import gc
import json
import weakref

import torch

from triderm_dist.config import Experiment, load
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.models.network import Network


def test_memory_of_a_failed_attempt_is_freed_before_the_next(tmp_path):
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    tower = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true}"
    words = [
        f"output={tmp_path / 'run'}",
        f"models.cnn={{kind: dual_cnn, width: 16, tower: {tower}}}",
        "data.folds=2",
        "train={epochs: 1, global_batch: 8, micro_batch: 8, trackers: []}",
    ]
    networks: list[weakref.ref] = []

    def out_of_memory(module: torch.nn.Module, inputs: tuple) -> None:
        if not isinstance(module, Network) or not module.training:
            return
        if not networks or networks[-1]() is not module:
            assert all(network() is None for network in networks)
            networks.append(weakref.ref(module))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError(f"no memory for {len(inputs[0])} lesions")

    gc.disable()  # the run must free memory without automatic collection
    hook = torch.nn.modules.module.register_module_forward_pre_hook(out_of_memory)
    try:
        run_folds(load(Experiment, None, words), index, ["cnn"], [0])
    finally:
        hook.remove()
        gc.enable()
    assert len(networks) == 3  # for micro-batches of 8, 4 and 2
    fold = tmp_path / "run" / "cnn" / "fold-0"
    assert json.loads((fold / "micro_batch.json").read_text())["micro_batch"] == 2
    assert (fold / "predictions.parquet").exists()
