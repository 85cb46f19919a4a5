"""Take one optimizer step for each case of a JSON list, on any number of ranks, then evaluate with an uneven tail.

Most ranks have no lesion in the last evaluation round. Rank 0 writes losses, gradients and predictions.
"""

import json
import sys

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.scaling import bytes_written
from triderm_dist.config import Experiment, load
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import read_index
from triderm_dist.distributed import collectives, parallel
from triderm_dist.distributed.full_state import gathered
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.engine.fold import add_trained_parts, new_network
from triderm_dist.engine.model_inputs import open_inputs
from triderm_dist.engine.model_tower import training_tower
from triderm_dist.engine.step import TrainStep
from triderm_dist.losses import CompoundLoss

GLOBAL_BATCH = 16
EVALUATED = 33
"""Number of lesions: with micro-batches of 4 the last round has one lesion, for any world size."""


def experiment(
    head: str,
    micro_batch: int,
    dropout: float,
    sums: str = "exact",
    tower: str = "test_vit",
    kind: str = "trimodal",
    fine: float = 0.0,
    lora: int = 0,
) -> Experiment:
    return load(
        Experiment,
        None,
        [
            f"models.tri.kind={kind}", "models.tri.width=32",
            "models.tri.heads=2", f"models.tri.dropout={dropout}", f"models.tri.head={head}",
            f"models.tri.tower={{source: 'timm:{tower}', pretrained: false, image_size: 32}}",
            "models.tri.tower.freeze_clinical=1", "models.tri.tower.freeze_dermoscopic=0",
            f"train.global_batch={GLOBAL_BATCH}", f"train.micro_batch={micro_batch}", f"train.loss.soft_f1_sums={sums}",
            "train.optim.clip_norm=1e9", f"train.loss.fine_weight={fine}",
            *([f"models.tri.tower.lora.rank={lora}"] if lora else []),
        ],
    )  # fmt: skip


def assert_same_on_all_ranks(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        mean = collectives.all_reduce_sum(tensor.clone()) / collectives.world_size()
        assert torch.equal(mean, tensor), name


def main(shards: str, output: str, cases: str) -> None:
    for case in json.loads(cases):
        index = read_index(case.get("shards", shards))
        more = {key: case[key] for key in ("sums", "tower", "kind", "fine", "lora") if key in case}
        config = experiment(case["head"], case["micro_batch"], case["dropout"], **more)
        model = config.models["tri"]
        train = model.train.model_copy(
            update={
                "precision": "fp32",
                "activation_checkpointing": case.get("checkpointing", False),
                "gradient_precision": case.get("gradients", "fp32"),
            }
        )
        accelerator = parallel.start_training(train)
        data = open_inputs(config, model, index, accelerator, training_tower(config, model, index))
        torch.manual_seed(0)
        network = add_trained_parts(new_network(model, data), model, index.task)
        gradients: dict[str, torch.Tensor] = {}

        def watched(network, gradients=gradients) -> torch.optim.Optimizer:
            def keep(*_) -> None:
                found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
                gradients.update({name: gathered(gradient).cpu().clone() for name, gradient in found.items()})

            optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.0)
            optimizer.register_step_pre_hook(keep)
            return optimizer

        wrapped, prepared, optimizer = parallel.wrap(accelerator, network, watched, train)
        counts, heads = list(range(1, len(index.diagnoses) + 1)), 1 + len(index.signature.views)
        loss = CompoundLoss(model.train.loss, model.head, counts, heads)
        plan = EpochPlan(Samples(torch.arange(len(index)).numpy(), index.labels, index.shard), Sampling(), 7, 0)
        batches = plan.batches(accelerator.process_index, accelerator.num_processes, GLOBAL_BATCH, case["batch"])
        first = next(iter(batches))
        (step,) = data.loaders.create([first], case["micro_batch"], accelerator.device, augment=model.train.augment)
        wrapped.train()
        guard = NonFiniteGuard(accelerator, optimizer)
        take_step = TrainStep(accelerator, wrapped, prepared, loss, model.train, guard)
        before = bytes_written()
        result = take_step(step, 0)
        sent = bytes_written() - before
        value = loss.values(result.sums, result.count)["loss"]
        buffers = {name: buffer for name, buffer in parallel.unwrap(wrapped).named_buffers() if "running" in name}
        assert_same_on_all_ranks(buffers)
        if accelerator.is_main_process:
            result = {**gradients, **buffers, "loss": torch.tensor(value, dtype=torch.float64)}
            if "gradients" in case:
                result["sent"] = torch.tensor(sent)
            save_file(result, f"{output}/{case['name']}.safetensors")
        accelerator.wait_for_everyone()
    rows = np.random.default_rng(0).permutation(len(index))[:EVALUATED]
    torch.manual_seed(0)
    network = accelerator.prepare_model(new_network(model, data), evaluation_mode=True)
    seen = evaluate(network, data.loaders, rows, accelerator, micro_batch=4, transforms=2)
    if accelerator.is_main_process:
        outputs = {name: torch.from_numpy(array) for name, array in vars(seen).items()}
        save_file(outputs, f"{output}/evaluation-{accelerator.num_processes}.safetensors")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
