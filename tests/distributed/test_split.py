"""An optimizer step is the same on 1, 2 and 4 ranks with 1, 2 and 4 micro-batches, and equals the plain formulas."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.scaling import Exchange, Network, exchanges, sent
from tests.processes import WORKERS, launch
from tests.small_tasks import FINE, TASKS
from triderm_dist.config import AugmentConfig, LoraConfig
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.evaluate import forward
from triderm_dist.losses import HeadKind, focal_loss, soft_f1_loss
from triderm_dist.models import build_network, build_towers

from .workers.step_worker import EVALUATED, GLOBAL_BATCH, experiment

WORKER = str(WORKERS / "step_worker.py")
OTHER_TASKS = ("dermoscopic only", "clinical only", "no concepts", "no fields", "dermoscopic photos only")
LAST = 6  # 100 lesions in batches of 16: the seventh has 4 lesions, so that some ranks have padding only


def cases_of(world: int) -> list[dict]:
    result = []
    for head in ("softmax", "sigmoid"):
        for batch in (0, LAST):
            for accumulation in (1, 2, 4):
                if world * accumulation <= 4:
                    micro = GLOBAL_BATCH // (world * accumulation)
                    name = f"{head}-{batch}-{world}-{accumulation}"
                    result.append({"name": name, "head": head, "batch": batch, "micro_batch": micro, "dropout": 0.0})
    # Dropout is drawn by lesion: it is the same for any world size, with and without activation checkpointing.
    result.append(
        {
            "name": f"dropout-{world}",
            "head": "softmax",
            "batch": 0,
            "micro_batch": 4,
            "dropout": 0.3,
            "checkpointing": world == 2,
        }
    )
    # The network of the last case is evaluated.
    return [*result, *(exchange_cases(world) if world > 1 else []), statistics_case(world)]


def exchange_cases(world: int, suffix: str = "") -> list[dict]:
    """Cases with each precision of exchanged gradients, one micro-batch a rank."""
    shared = {"head": "softmax", "batch": 0, "micro_batch": GLOBAL_BATCH // world, "dropout": 0.0}
    return [
        {"name": f"exchange-{precision}-{world}{suffix}", "gradients": precision, **shared}
        for precision in ("fp32", "bf16")
    ]


def statistics_case(world: int) -> dict:
    """A CNN with trained batch norms, which normalize each micro-batch, so that its size must be equal in all cases."""
    return {
        "name": f"statistics-{world}",
        "head": "softmax",
        "batch": 0,
        "micro_batch": 4,
        "dropout": 0.0,
        "tower": "test_efficientnet",
        "checkpointing": world == 2,
    }


def sharded_cases() -> list[dict]:
    """Cases for FSDP2, which also averages over ranks, and reduces gradients after the last micro-batch only."""
    return [
        {**case, "name": case["name"] + "-fsdp2", "checkpointing": case["batch"] == LAST}
        for case in cases_of(2)
        if case["head"] == "softmax" and case["dropout"] == 0 and not {"tower", "gradients"} & case.keys()
    ] + [*exchange_cases(2, "-fsdp2"), statistics_case(2) | {"name": "statistics-2-fsdp2"}]


def task_cases(folder: Path) -> list[dict]:
    """Cases for networks of other tasks than MILK10k, packed in FOLDER, on two ranks with accumulation."""
    shared = {"head": "softmax", "batch": 0, "micro_batch": 4, "dropout": 0.0}
    return [
        {"name": f"{task}-{kind}", "shards": str(folder / task), "kind": kind, **shared}
        for task in OTHER_TASKS
        for kind in ("trimodal", "dual_cnn")
    ] + [{"name": FINE.name, "shards": str(folder / FINE.name), "fine": 0.7, "lora": 2, **shared}]


@pytest.fixture(scope="module")
def small_sets(tmp_path_factory) -> Path:
    """A folder with packed sets of 20 synthetic lesions by the name of their task."""
    folder = tmp_path_factory.mktemp("sets")
    for task in OTHER_TASKS:
        synthetic_shards(folder / task, 20, 40, TASKS[task])
    synthetic_shards(folder / FINE.name, 20, 40, FINE)
    return folder


@pytest.fixture(scope="module")
def steps(packed, small_sets, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("steps")
    for world in (1, 2, 4):
        cases = [*(task_cases(small_sets) if world == 2 else []), *cases_of(world)]
        launch(WORKER, str(packed), str(folder), json.dumps(cases), ranks=world)
    sharded = json.dumps(sharded_cases())
    launch(WORKER, str(packed), str(folder), sharded, ranks=2, config="accelerate_configs/fsdp2.yaml")
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def reference(
    index: ShardIndex, head: HeadKind, number: int, kind: str = "trimodal", fine: float = 0.0, lora: int = 0
) -> dict[str, torch.Tensor]:
    """Return loss and gradients of a global batch: one process, one batch without splitting or padding, losses from the
    formulas by autograd.
    """
    model = experiment(head, GLOBAL_BATCH, 0.0, "exact", kind=kind).models["tri"]
    torch.manual_seed(0)
    network = build_network(model, index.signature, build_towers(model.tower, index.signature.views)).train()
    if lora:
        network.add_lora(LoraConfig(rank=lora))
    if fine:
        network.add_fine_head(len(index.task.fine.names))
    tower = build_towers(model.tower)[0]
    source = PhotoSource(index, tower.image_size, tower.mean, tower.std)
    plan = EpochPlan(Samples(torch.arange(len(index)).numpy(), index.labels, index.shard), Sampling(), 7, 0)
    (step,) = Loader(
        index,
        source,
        [list(plan.batches(0, 1, GLOBAL_BATCH))[number]],
        micro_batch=GLOBAL_BATCH,
        device=torch.device("cpu"),
        augment=AugmentConfig(),
    )
    batch, keep = step.micro_batches[0], slice(0, step.count)
    outputs = network(
        batch.clinical[keep],
        batch.dermoscopic[keep],
        batch.view_present[keep],
        batch.concepts[keep],
        batch.metadata[keep],
    )
    labels, total = batch.labels[keep], torch.zeros(())
    for weight, logits in zip((1.0, 0.3, 0.3), outputs.heads, strict=False):
        part = 0.5 * focal_loss(logits, labels, head).mean() + 0.5 * soft_f1_loss(logits, labels, head)
        total = total + weight * part
    if fine:
        labels = index.fine[[index.lesion_ids.tolist().index(name) for name in batch.lesion_ids[: step.count]]]
        known = torch.from_numpy(labels >= 0)
        losses = torch.nn.functional.cross_entropy(
            outputs.fine[known], torch.from_numpy(labels)[known], reduction="sum"
        )
        total = total + fine * losses / step.count
    total.backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {**gradients, "loss": total.detach().double()}


@pytest.fixture(scope="module")
def references(packed) -> dict[str, dict[str, torch.Tensor]]:
    index = read_index(packed)
    heads: tuple[HeadKind, ...] = ("softmax", "sigmoid")
    return {f"{head}-{number}": reference(index, head, number) for head in heads for number in (0, LAST)}


def assert_same_step(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    assert got["loss"].item() == pytest.approx(expected["loss"].item(), abs=1e-6)
    # Relative to the largest gradient: some gradients are zero up to rounding (the bias of attention keys).
    largest = max(gradient.abs().max() for name, gradient in expected.items() if name != "loss")
    for name, gradient in expected.items():
        scale = max(gradient.abs().max(), 1e-3 * largest)
        assert ((got[name] - gradient).abs().max() / scale).item() < tolerance, name


def names() -> list[str]:
    cases = [case for world in (1, 2, 4) for case in cases_of(world) if case["dropout"] == 0]
    return [case["name"] for case in [*cases, *sharded_cases()] if not {"tower", "gradients"} & case.keys()]


@pytest.mark.parametrize("name", names())
def test_split_step_equals_the_reference_step(steps, references, name):
    head, batch, *_ = name.split("-")
    assert_same_step(steps[name], references[f"{head}-{batch}"])


@pytest.mark.parametrize("kind", ["trimodal", "dual_cnn"])
@pytest.mark.parametrize("task", OTHER_TASKS)
def test_split_step_of_a_smaller_network_equals_the_reference_step(steps, small_sets, task, kind):
    index = read_index(small_sets / task)
    assert_same_step(steps[f"{task}-{kind}"], reference(index, "softmax", 0, kind))


def test_split_step_with_finer_labels_and_lora_equals_the_reference_step(steps, small_sets):
    expected = reference(read_index(small_sets / FINE.name), "softmax", 0, fine=0.7, lora=2)
    assert expected["fine_head.linear.weight"].abs().max() > 0
    tower = {name.rpartition(".")[2] for name, gradient in expected.items() if name.startswith("towers")}
    assert tower == {"a", "b"}  # the products alone
    assert_same_step(steps[FINE.name], expected)


def test_dropout_is_independent_of_the_world_size(steps):
    for world in (2, 4):
        assert_same_step(steps[f"dropout-{world}"], steps["dropout-1"])
    assert not torch.equal(steps["dropout-1"]["loss"], steps["softmax-0-1-4"]["loss"])


EXCHANGES = {"2": ("DDP", 2), "4": ("DDP", 4), "2-fsdp2": ("FSDP2", 2)}


@pytest.mark.parametrize("case", EXCHANGES)
def test_bf16_exchange_rounds_gradients_to_bf16_only(steps, case):
    fp32, bf16 = (vectors(steps[f"exchange-{precision}-{case}"]) for precision in ("fp32", "bf16"))
    error = (bf16 - fp32).norm() / fp32.norm()
    assert 1e-4 < error < 2**-8  # half a unit of bf16's 8 bits for each rounding, few of them the same way
    assert steps[f"exchange-bf16-{case}"]["loss"] == steps[f"exchange-fp32-{case}"]["loss"]


def vectors(step: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all gradients of a step as one vector."""
    return torch.cat([value.flatten() for name, value in step.items() if name not in ("loss", "sent")])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes that a process writes")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", EXCHANGES)
def test_ranks_send_the_bytes_of_the_formulas(steps, packed, case, precision):
    """Those of trained weights only: a fifth more would be sent with the frozen ones."""
    strategy, world = EXCHANGES[case]
    got = steps[f"exchange-{precision}-{case}"]
    model = experiment("softmax", GLOBAL_BATCH, 0.0).models["tri"]
    network = build_network(model, read_index(packed).signature, build_towers(model.tower))
    trained = len(vectors(got))
    blocks = {id(each) for block in network.blocks() for each in block.parameters() if each.requires_grad}
    outside = sum(each.numel() for each in network.parameters() if each.requires_grad and id(each) not in blocks)
    of = exchanges(strategy, Network(trained, outside, 0, 1, 0, 0, 0, 0), {"fp32": 4, "bf16": 2}[precision])
    if strategy == "FSDP2":
        of.append(Exchange("all-gather", 4 * trained, "after"))  # the worker's, of the gradients
    assert got["sent"].item() == pytest.approx(sent(of, world, gloo=True), rel=0.03)  # shards are padded
    frozen = sum(each.numel() for each in network.parameters()) - trained
    assert frozen > 0.1 * trained


@pytest.fixture(scope="module")
def statistics(packed) -> dict[str, torch.Tensor]:
    """Expected running statistics after one step: the mean of one update per micro-batch from the same start."""
    index = read_index(packed)
    model = experiment("softmax", 4, 0.0, tower="test_efficientnet").models["tri"]
    torch.manual_seed(0)
    network = build_network(model, index.signature, build_towers(model.tower)).train()
    tower = build_towers(model.tower)[0]
    source = PhotoSource(index, tower.image_size, tower.mean, tower.std)
    plan = EpochPlan(Samples(torch.arange(len(index)).numpy(), index.labels, index.shard), Sampling(), 7, 0)
    first = next(iter(plan.batches(0, 1, GLOBAL_BATCH)))
    (step,) = Loader(index, source, [first], micro_batch=4, device=torch.device("cpu"), augment=AugmentConfig())
    start, seen = {name: value.clone() for name, value in network.named_buffers()}, []
    for batch in step.micro_batches:
        for name, value in network.named_buffers():
            value.copy_(start[name])
        forward(network, batch)
        seen.append({name: value.clone() for name, value in network.named_buffers() if "running" in name})
    return {name: torch.stack([values[name] for values in seen]).mean(0) for name in seen[0]}


@pytest.mark.parametrize("case", ["1", "2", "4", "2-fsdp2"])
def test_batch_norm_statistics_cover_all_micro_batches_and_ranks(steps, statistics, case):
    got = steps[f"statistics-{case}"]
    assert statistics
    for name, expected in statistics.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    gradients = {name: value for name, value in got.items() if name not in statistics}
    single = {name: value for name, value in steps["statistics-1"].items() if name not in statistics}
    assert_same_step(gradients, single, tolerance=1e-4)  # batch norms amplify rounding errors of sums that cancel


@pytest.mark.parametrize("world", [2, 4])
def test_evaluation_equals_one_process_with_an_uneven_tail(steps, world):
    single, split = steps["evaluation-1"], steps[f"evaluation-{world}"]
    assert len(set(split["rows"].tolist())) == EVALUATED
    for name, expected in single.items():
        torch.testing.assert_close(split[name], expected, rtol=1e-5, atol=1e-6)
