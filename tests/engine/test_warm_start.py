"""Warm start: what is taken of another run, which network a fold begins with, and what is refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.union_sets import MAIN, OTHER, pack_set
from triderm_dist.config import CONFIG_FILE, Experiment, load, save
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.fold import assigned_folds, is_fold_finished, result_hash
from triderm_dist.engine.network_files import read_info, read_weights
from triderm_dist.engine.refit import refit
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.engine.warm_start import find_networks, tower_weights, transfer_weights
from triderm_dist.models import build_network, build_towers
from triderm_dist.schema import CheckpointError, ConfigError, DataError, Signature

TOWER = (
    "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, freeze_clinical: 0, freeze_dermoscopic: 0%s}"
)
MODELS = {
    "cnn": "{kind: dual_cnn, width: 16%s, tower: %s}",
    "tri": "{kind: trimodal, width: 16, heads: 2%s, tower: %s}",
}


def experiment(index: ShardIndex, output: Path, init: str | None = None, tower: str = "", model: str = "cnn", *words):
    settings = MODELS[model] % (f", init: '{init}'" if init else "", TOWER % tower)
    return load(Experiment, None, [
        f"data.shards={index.folder}", f"output={output}", f"models.{model}={settings}", "data.folds=2",
        "train={epochs: 1, global_batch: 8, micro_batch: 8, trackers: [], augment: {token_variants: 1}}", *words,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[ShardIndex, ShardIndex]:
    """A set of two views and four diagnoses, and one of dermoscopic photos and four others."""
    folder = tmp_path_factory.mktemp("sets")
    return pack_set(folder / "main", MAIN, 16, 0), pack_set(folder / "other", OTHER, 12, 10_000, (40, 40), prefix="O")


@pytest.fixture(scope="module")
def other_run(sets, tmp_path_factory) -> Path:
    """A run with both folds of both models on the other set."""
    output = tmp_path_factory.mktemp("other") / "run"
    for model in MODELS:
        run_folds(experiment(sets[1], output, model=model), sets[1], [model], range(2))
    save(experiment(sets[1], output), output / CONFIG_FILE)
    return output


def untrained(config: Experiment, signature: Signature, model: str):
    torch.manual_seed(5)
    settings = config.models[model]
    return build_network(settings, signature, build_towers(settings.tower, signature.views)), settings


@pytest.mark.parametrize("model", MODELS)
def test_towers_and_shared_parts_are_taken_and_others_are_new(sets, other_run, tmp_path, model):
    main, _ = sets
    config = experiment(main, tmp_path, model=model)
    network, settings = untrained(config, main.signature, model)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    source = find_networks(f"{other_run}/{model}/fold-1", model)[0]
    transfer = transfer_weights(network, settings, source)
    weights, after = read_weights(source.folder / "weights"), network.state_dict()
    assert set(transfer.taken) | set(transfer.new) == set(after)
    for view in ("clinical", "dermoscopic"):  # the other set has dermoscopic photos only
        for name in network.towers[view].state_dict():
            assert torch.equal(after[f"towers.{view}.{name}"], weights[f"towers.dermoscopic.{name}"]), name
    for name in transfer.new:
        assert torch.equal(after[name], before[name]), name
    for name in set(transfer.taken) - {name for name in after if name.startswith("towers.")}:
        assert torch.equal(after[name], weights[name]), name
    parts = transfer.json()
    assert "head" in parts["new"] and "aux_heads" in parts["new"]  # four diagnoses too, but others
    assert parts["taken"]["views"] == 5  # of the dermoscopic view
    if model == "tri":
        assert {"fusion", "pooling"} <= set(parts["new"]) | set(parts["taken"])
        assert "semantic.null" in transfer.taken and "semantic.concepts.name" in transfer.new
        assert not any(name.startswith("semantic.age") for name in transfer.taken)  # of another range
    else:
        assert {"table", "fusion"} <= set(parts["new"])
    assert "towers.clinical" in transfer.describe() and "new" in transfer.describe()


def test_all_is_taken_of_a_network_of_the_same_task(sets, other_run, tmp_path):
    config = experiment(sets[1], tmp_path)
    network, settings = untrained(config, sets[1].signature, "cnn")
    source = find_networks(f"{other_run}/cnn/fold-0/weights.safetensors", "cnn")[0]
    transfer = transfer_weights(network, settings, source)
    assert not transfer.new and not transfer.left
    swapped = replace(sets[1].signature, diagnoses=sets[1].signature.diagnoses[::-1])
    network, settings = untrained(config, swapped, "cnn")
    assert {name.split(".")[0] for name in transfer_weights(network, settings, source).new} == {"head", "aux_heads"}


def test_a_network_that_nothing_fits_is_refused(sets, other_run, tmp_path):
    config = experiment(
        sets[0], tmp_path, None, "", "cnn", "models.cnn.width=24", "models.cnn.tower.source=timm:test_vit"
    )
    network, settings = untrained(config, sets[0].signature, "cnn")
    with pytest.raises(CheckpointError, match="nothing in it fits"):
        transfer_weights(network, settings, find_networks(f"{other_run}/cnn/fold-0", "cnn")[0])


def test_training_starts_from_another_set_and_says_so(sets, other_run, tmp_path, capsys):
    main, _ = sets
    config = experiment(main, tmp_path / "run", f"{other_run}/cnn")
    run_folds(config, main, ["cnn"], [0])
    info = read_info(tmp_path / "run" / "cnn" / "fold-0" / "fold")
    assert info["init"]["network"] == "cnn/fold-0" and info["init"]["run"] == str(other_run)
    assert "towers.clinical" in info["init"]["taken"] and "head" in info["init"]["new"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"cnn fold 0: starts from {other_run}/cnn/fold-0: towers.clinical" in printed
    plain = experiment(main, tmp_path / "plain")
    run_folds(plain, main, ["cnn"], [0])
    ours, others = (read_weights(tmp_path / name / "cnn/fold-0/weights") for name in ("run", "plain"))
    assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_each_fold_starts_from_the_network_that_has_not_seen_it(sets, other_run, tmp_path):
    other = sets[1]
    config = experiment(other, tmp_path / "run", f"{other_run}/cnn")
    run_folds(config, other, ["cnn"], range(2))
    for fold in range(2):
        info = read_info(tmp_path / "run" / "cnn" / f"fold-{fold}" / "fold")
        assert info["init"]["network"] == f"cnn/fold-{fold}"
    named = experiment(other, tmp_path / "named", f"{other_run}/cnn/fold-0")
    run_folds(named, other, ["cnn"], [0])
    with pytest.raises(DataError, match=r"cnn/fold-0 was trained on lesions that this training is to predict.*OL0"):
        run_folds(named, other, ["cnn"], [1])
    frozen = experiment(other, tmp_path / "frozen", f"{other_run}/cnn", ", frozen: true, shared: true")
    with pytest.raises(DataError, match="each of its 2 networks"):
        run_folds(frozen, other, ["cnn"], [0])


def test_a_network_trained_on_the_same_photos_under_other_names_is_refused(sets, other_run, tmp_path):
    copy = pack_set(tmp_path / "copy", OTHER, 12, 10_000, (40, 40), prefix="copy-")
    with pytest.raises(DataError, match=r"was trained on lesions.*copy-L0"):
        run_folds(experiment(copy, tmp_path / "run", f"{other_run}/cnn/fold-0"), copy, ["cnn"], [1])


def test_test_lesions_are_not_seen_either(sets, other_run, tmp_path):
    main, other = sets
    config = experiment(main, tmp_path, f"{other_run}/cnn", "", "cnn", f"data.test_shards={other.folder}")
    with pytest.raises(DataError, match="OL0"):
        run_folds(config, main, ["cnn"], [0])


def test_lesions_that_the_start_of_the_other_network_has_seen_are_seen(sets, tmp_path, capsys):
    """A network of the training set, then one of the other set that begins with it, then one of the training set."""
    main, other = sets
    runs = [tmp_path / name for name in ("first", "second", "third")]
    first, second = experiment(main, runs[0]), experiment(other, runs[1], f"{runs[0]}/cnn/fold-0")
    for config, index in ((first, main), (second, other)):
        save(config, config.folder / CONFIG_FILE)
        run_folds(config, index, ["cnn"], [0])
    third = experiment(main, runs[2], f"{runs[1]}/cnn")
    run_folds(third, main, ["cnn"], [0])
    with pytest.raises(DataError, match=r"cnn/fold-0 was trained on lesions that this training is to predict.*L0"):
        run_folds(third, main, ["cnn"], [1])
    shutil.rmtree(runs[0])
    capsys.readouterr()
    run_folds(third, main, ["cnn"], [1])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{runs[1]}/cnn/fold-0 began with cnn/fold-0 of {runs[0]}, which is not there or has changed" in printed


def test_a_frozen_tower_gets_the_trained_weights_and_outlives_the_run(sets, other_run, tmp_path, capsys):
    main, _ = sets
    source = tmp_path / "source"
    shutil.copytree(other_run, source)
    config = experiment(main, tmp_path / "run", f"{source}/cnn", ", frozen: true, shared: true")
    run_folds(config, main, ["cnn"], [0])
    (start,) = re.findall(r"starts from [^;]*;.*?left", " ".join(capsys.readouterr().out.split()))
    assert "frozen tower" in start and "towers." not in start
    run = TrainedNetwork.read(tmp_path / "run" / "cnn" / "fold-0")
    (tower,) = tower_weights(run, read_weights(run.folder / "weights")).values()
    trained = read_weights(source / "cnn" / "fold-0" / "weights")
    for name, tensor in tower.items():
        assert torch.equal(tensor, trained[f"towers.dermoscopic.{name}"]), name
    finished = result_hash(config, main, "cnn", 0)
    shutil.rmtree(source)
    assert is_fold_finished(config, main, "cnn", 0) and result_hash(config, main, "cnn", 0) == finished
    with pytest.raises(ConfigError, match="no such run"):
        result_hash(config, main, "cnn", 1)


def test_a_frozen_tower_and_the_rest_of_all_folds_start_from_one_network(sets, other_run, tmp_path):
    """The last lesion has the photo of OL000, on which fold 0 of the other run was trained, so that fold 1 remains."""
    other = sets[1]
    assert assigned_folds(other, experiment(other, tmp_path).data)[list(other.lesion_ids).index("OL000")] == 1
    index = pack_set(tmp_path / "new", OTHER, 12, 10_000 - 2 * 11, (40, 40), prefix="N")
    config = experiment(index, tmp_path / "run", f"{other_run}/cnn", ", frozen: true, shared: true")
    run_folds(config, index, ["cnn"], range(2))
    folders = (config.fold_folder("cnn", fold) for fold in range(2))
    assert [read_info(folder / "fold")["init"]["network"] for folder in folders] == ["cnn/fold-1"] * 2


def test_moved_source_keeps_finished_folds_and_other_weights_do_not(sets, other_run, tmp_path):
    main, _ = sets
    shutil.copytree(other_run, tmp_path / "a")
    hashes = [
        result_hash(experiment(main, tmp_path / "run", f"{where}/cnn/{fold}"), main, "cnn", 0)
        for where, fold in ((other_run, "fold-0"), (tmp_path / "a", "fold-0"), (other_run, "fold-1"))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_refit_is_preferred_and_starts_from_the_other_refit(sets, other_run, tmp_path):
    main, other = sets
    shutil.copytree(other_run, tmp_path / "other")
    refit(experiment(other, tmp_path / "other"), other, ["cnn"])
    assert [each.name for each in find_networks(f"{tmp_path}/other/cnn", "cnn")] == ["cnn/refit"]
    assert [each.name for each in find_networks(f"{tmp_path}/other/cnn/refit", "cnn")] == ["cnn/refit"]
    config = experiment(main, tmp_path / "run", f"{tmp_path}/other/cnn")
    run_folds(config, main, ["cnn"], range(2))
    refit(config, main, ["cnn"])
    assert read_info(tmp_path / "run" / "refit" / "cnn" / "fold")["init"]["network"] == "cnn/refit"


@pytest.mark.parametrize(
    ("init", "text"),
    [
        ("{run}/nonsense", "no such run"),
        ("{run}/towers", "no trained network there"),
        ("{run}", "has the models cnn, tri; name one"),
        ("{run}/cnn/fold-9", "no such run"),
    ],
)
def test_unknown_networks_are_refused_in_one_line(other_run, init, text):
    with pytest.raises(ConfigError, match=text) as error:
        find_networks(init.format(run=other_run), "other")
    assert "\n" not in str(error.value) and "models.other.init" in str(error.value)


def test_the_model_of_the_same_name_is_taken(other_run):
    assert [each.name for each in find_networks(str(other_run), "tri")] == ["tri/fold-0", "tri/fold-1"]
