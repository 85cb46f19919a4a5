"""What is shared between networks changes no number: frozen towers, frozen blocks, the stacker's wide columns."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.conftest import write_challenge
from tests.ensemble.conftest import without_file_hashes
from tests.inference.small_run import train
from tests.inference.small_tower import SMALL_TOWER
from triderm_dist.commands.crossval import CrossvalRun
from triderm_dist.commands.crossval import main as crossval
from triderm_dist.commands.embed import EmbedRun
from triderm_dist.commands.embed import main as embed
from triderm_dist.commands.predict import PredictRun
from triderm_dist.commands.predict import main as predict
from triderm_dist.commands.stack import StackRun
from triderm_dist.commands.stack import main as stack
from triderm_dist.config import Experiment, ModelConfig, TowerConfig, load
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.ensemble.alignment import fit_alignments, save_alignments
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.ensemble.fitted_stacker import fit_stacker
from triderm_dist.ensemble.run_files import ALIGNMENTS_FILE, OOF_FILE, STACK_FILE
from triderm_dist.ensemble.stack_inputs import (
    column_names,
    embedding_tower,
    embeddings_path,
    training_columns,
    write_embeddings,
)
from triderm_dist.ensemble.stacker import TrainingRows
from triderm_dist.inference.networks import NetworkLoader, split_common
from triderm_dist.inference.predictor import Predictor
from triderm_dist.inference.run import Run
from triderm_dist.inference.run_folder import open_run_folder
from triderm_dist.inference.slim_run import write_slim_run
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.towers import TOWER_SOURCES
from triderm_dist.predictions import average_test, read_oof, read_predictions
from triderm_dist.schema import VIEWS, DataError
from triderm_dist.tasks import milk10k_task

LESIONS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with a frozen tower, with frozen blocks, and with one tower for both views; its test set is predicted."""
    root = tmp_path_factory.mktemp("shared")
    run, weights = root / "run", root / "tower.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), weights)
    tower = f"source: 'timm:test_efficientnet@{weights}', image_size: 32"
    words = [
        f"output={run}",
        f"models.cached={{kind: trimodal, width: 16, heads: 2, depth: 1, tower: {{{tower}, frozen: true}}}}",
        f"models.blocks={{kind: dual_cnn, width: 16, tower: {{{tower}, freeze_clinical: 1, freeze_dermoscopic: 3}}}}",
        f"models.one={{kind: dual_cnn, width: 16, tower: {{{tower}, shared: true, freeze_clinical: 99, "
        "freeze_dermoscopic: 99}}",
        "data.folds=2",
        "train={epochs: 1, global_batch: 11, micro_batch: 11, trackers: []}",
        "stack={max_rounds: 5, max_depth: 1}",
        "ensemble={bootstrap: 20, rounds: 3, use: ensemble}",
        "predict.batch=3",
    ]
    pack_shards(read_challenge(write_challenge(root / "train", 44).folder), run / "shards" / "train", short_side=None)
    test = read_challenge(write_challenge(root / "test", LESIONS, "MILK10k_Test", labeled=False).folder)
    pack_shards(test, run / "shards" / "test", short_side=None)
    crossval(load(CrossvalRun, None, words))
    stack(load(StackRun, None, words))
    predict(load(PredictRun, None, [f"run={run}", "submit=false"]))
    weights.unlink()  # the run keeps what it needs
    return run


def photos_of(folder: Path) -> PhotoSet:
    run = open_run_folder(folder)
    dataset = read_challenge(folder.parent / "test")
    lesions = dataset.lesions
    return PhotoSet(
        run.task, run.concepts, {view: [each.images[view] for each in lesions] for view in VIEWS},
        canvas=run.canvas, short_side=run.short_side, lesion_ids=[each.lesion_id for each in lesions],
        concept_scores=np.array([each.concepts for each in lesions]),
        metadata=np.array([each.metadata for each in lesions]),
    )  # fmt: skip


def check(folder: Path, predictor: Predictor) -> None:
    """Compare with what each network predicted of the packed test set."""
    parts = [read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet"))]
    expected, photos = FittedEnsemble.load(folder).predict(average_test(parts), parts)[0], photos_of(folder)
    rows = [list(expected.lesion_ids).index(lesion) for lesion in photos.lesion_ids]
    predictions = predictor.predict(photos, 8)
    assert list(predictions.results.lesion_ids) == photos.lesion_ids.tolist()
    np.testing.assert_allclose(predictions.results.probabilities, expected.probabilities[rows], atol=1e-6)
    assert np.array_equal(predictions.results.decisions, expected.decisions[rows])
    assert predictions.members.shape == (len(predictor.members), LESIONS, 11)


def test_shared_parts_are_computed_once_and_change_nothing(folder):
    predictor = Predictor(folder, device="cpu")
    cached, blocks, one = predictor.models
    assert cached.encoders["clinical"] is cached.encoders["dermoscopic"]
    assert one.encoders["clinical"] is one.encoders["dermoscopic"] is not cached.encoders["clinical"]
    assert len(blocks.encoders["clinical"]) == 2 and len(blocks.encoders["dermoscopic"]) == 4  # with the stem
    for network in one.networks:
        assert not list(network.towers.parameters())
    calls: list[int] = []
    for encoder in {*cached.encoders.values(), *blocks.encoders.values(), *one.encoders.values()}:
        encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    check(folder, predictor)
    # Two batches of three lesions and one of the seventh: 8 transforms of 2 photos, for 3 models, not for each fold.
    assert sum(calls) == 3 * 2 * 8 * 9


def test_the_frozen_blocks_of_a_vit_are_split_off_without_a_change():
    signature = milk10k_task().signature(("clinical/veil",))
    tower = TowerConfig(
        source="timm:test_vit", pretrained=False, image_size=32, freeze_clinical=2, freeze_dermoscopic=3
    )
    config = ModelConfig(width=16, heads=2, tower=tower)
    network = build_network(config, signature, build_towers(tower)).eval()
    photos = torch.randn(2, 3, 3, 32, 32)
    others = torch.ones(3, 2, dtype=torch.bool), torch.rand(3, 1), torch.full((3, len(signature.fields)), torch.nan)
    with torch.no_grad():
        expected = network(*photos, *others).logits
        encoders = split_common([network], VIEWS)
        encoded = [encoders[view](photo) for view, photo in zip(VIEWS, photos, strict=True)]
        assert torch.equal(network(*encoded, *others).logits, expected)


def test_networks_alone_take_pixels_and_compute_the_same(folder):
    run, photos = Run(open_run_folder(folder), device="cpu"), photos_of(folder)
    row = [photos.photos[view][0] for view in VIEWS]
    predictions = run.predictor.predict(photos.take(slice(0, 1)), 1)
    for each in run.networks():
        pixels = [each.preprocess(photo)[None] for photo in row]
        inputs = photos.inputs(np.arange(1))
        tensors = [torch.from_numpy(part) for part in (inputs.view_present, inputs.concepts, inputs.metadata)]
        with torch.no_grad():
            logits = each.network(*pixels, *tensors).logits[0].numpy()
        weights = run._run.networks[each.model][each.fold].weights
        (expected,) = (part for part in predictions.parts if part.model_hash[0] == weights)
        np.testing.assert_allclose(logits, expected.logits[0], atol=1e-5)


@pytest.mark.parametrize("extra", ["features", "embeddings"])
def test_wide_columns_of_the_stacker_are_computed_for_new_photos(folder, extra):
    """As `stack.extra` does where it improves the estimate; the test set's own columns are files of the run."""
    experiment = load(Experiment, folder / "config.yaml")
    table = read_oof(folder / OOF_FILE, features=True)
    models = ["cached", "blocks", "one"]
    if extra == "features":
        parts = [read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet"))]
        save_alignments(folder / ALIGNMENTS_FILE, fit_alignments(parts))
    else:
        embed(load(EmbedRun, None, [f"run={folder}", f"data.test_shards={folder / 'shards' / 'test'}"]))
    columns = training_columns(folder, extra, table, models)
    names = column_names(table, models)
    rows = TrainingRows(
        source=columns, indices=np.arange(len(table)), labels=table.labels, groups=table.groups, names=names,
        diagnoses=table.diagnoses, extra=extra, wide=columns.shape[1] - len(names),
    )  # fmt: skip
    stacker = fit_stacker(rows, experiment.stack.model_copy(update={"components": 4, "max_depth": 4}), cores=1)
    assert stacker.extra == extra and stacker.reduction is not None
    stacker.save(folder / STACK_FILE, table.task)
    without_file_hashes(folder)
    check(folder, Predictor(folder, device="cpu"))


def test_many_photos_prepare_frozen_towers_which_changes_probabilities_by_rounding_alone(folder):
    photos, predictor, lines = photos_of(folder), Predictor(folder, device="cpu"), list[str]()
    expected = predictor.predict(photos, 8)
    predictor.prepare(15, 8, lines.append)
    predictor.predict(photos, 8)
    assert not lines  # 240 photos would not repay it
    predictor.prepare(16, 8, lines.append)
    predictions = predictor.predict(photos, 8)
    assert len(lines) == 1 and "frozen tower: computed by" in lines[0]
    np.testing.assert_allclose(predictions.results.probabilities, expected.results.probabilities, atol=1e-4)


@pytest.mark.slow
def test_embeddings_by_another_tower_than_the_stacker_read_are_refused(tmp_path, monkeypatch):
    """Towers of one source differ in settings or weights."""
    monkeypatch.setitem(TOWER_SOURCES, "small", SMALL_TOWER)
    tower = "source: 'small:', pretrained: false, frozen: true"
    models = [
        f"models.{frame}={{kind: dual_cnn, width: 16, tower: {{{tower}, frame: {frame}}}}}"
        for frame in ("square", "whole")
    ]
    run = train(tmp_path, models, shards="run/shards/train")
    path = embeddings_path(run, "train")
    embed(load(EmbedRun, None, [f"run={run}", "model=whole"]))
    index = read_index(run / "shards" / "train")
    telling = np.eye(len(index.diagnoses))[index.labels]  # so that the stacker keeps them
    write_embeddings(path, index.lesion_ids.tolist(), telling, embedding_tower(run))
    stack(load(StackRun, None, [f"run={run}", "stack.extra=[embeddings]", "stack={min_child_weight: 0}"]))
    loader = NetworkLoader(open_run_folder(run), torch.device("cpu"))
    assert loader.run.fitted.stacker.extra == "embeddings"
    assert loader.load_embedding().preprocessing.frame == "whole"
    slim = tmp_path / "slim"
    slim.mkdir()
    write_slim_run(loader.run, slim)
    assert NetworkLoader(open_run_folder(slim), torch.device("cpu")).load_embedding().preprocessing.frame == "whole"

    embed(load(EmbedRun, None, [f"run={run}", "model=square"]))
    with pytest.raises(DataError, match=r"embeddings\.train\.parquet: by another tower than .* run triderm stack"):
        _ = open_run_folder(run).fitted.stacker
