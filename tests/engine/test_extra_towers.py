"""Extra towers: tokens side by side, from the cache and from photos; which networks are taken, and what is refused."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from tests.union_sets import MAIN, OTHER, pack_set
from triderm_dist.commands import bench
from triderm_dist.config import CONFIG_FILE, Experiment, load, save
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed.parallel import start_inference
from triderm_dist.doctor.networks import Hardware, network_findings
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.fold import is_fold_finished, result_hash
from triderm_dist.engine.model_inputs import open_inputs
from triderm_dist.engine.model_tower import recorded_tower
from triderm_dist.engine.network_files import load_weights, read_info, read_weights
from triderm_dist.engine.predict_test import predict_test
from triderm_dist.engine.refit import refit
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.inference.exported_files import write_network
from triderm_dist.inference.exported_network import ExportedNetwork
from triderm_dist.inference.networks import FrozenTower
from triderm_dist.models import build_network
from triderm_dist.models.joined_tower import JoinedTower
from triderm_dist.models.tower_record import FOLDER, load_tower
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import ConfigError, DataError

Run = TypeVar("Run", bound=Experiment)
TOWER = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32%s}"
QUICK = (
    "data.folds=2",
    "train={epochs: 1, global_batch: 8, micro_batch: 8, trackers: [], precision: fp32, augment: {token_variants: 1}}",
)


def experiment(index: ShardIndex, output: Path, model: str, *words: str, of: type[Run] = Experiment) -> Run:
    return load(of, None, [f"data.shards={index.folder}", f"output={output}", f"models.m={model}", *QUICK, *words])


def joined(index: ShardIndex, output: Path, *extra: str, words=(), of: type[Run] = Experiment) -> Run:
    """Settings of an MLP with extra towers, each given as {init: ..., logits: ...}."""
    own = TOWER % ", frozen: true, shared: true"
    settings = f"{{kind: mlp, width: 16, heads: 2, tower: {own}, extra_towers: [{', '.join(extra)}]}}"
    return experiment(index, output, settings, *words, of=of)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[ShardIndex, ShardIndex]:
    """A set of two views and four diagnoses, and one of dermoscopic photos and four others."""
    folder = tmp_path_factory.mktemp("sets")
    return pack_set(folder / "main", MAIN, 16, 0), pack_set(folder / "other", OTHER, 12, 10_000, (40, 40), prefix="O")


@pytest.fixture(scope="module")
def other(sets, tmp_path_factory) -> Path:
    """One fold of a dual CNN on the other set, whose tower was tuned."""
    output = tmp_path_factory.mktemp("other") / "run"
    tuned = TOWER % ", shared: true, freeze_clinical: 0, freeze_dermoscopic: 0"
    config = experiment(sets[1], output, f"{{kind: dual_cnn, width: 16, tower: {tuned}}}")
    run_folds(config, sets[1], ["m"], [0])
    save(config, output / CONFIG_FILE)
    return output


@pytest.fixture(scope="module")
def run(sets, other, tmp_path_factory) -> Experiment:
    """A run with one tower of its own, that of the other run, and the same one with its logits."""
    own = tmp_path_factory.mktemp("own") / "run"
    source = own.parent / "source"
    shutil.copytree(other, source)
    config = joined(sets[0], own, f"{{init: '{source}/m'}}", f"{{init: '{source}/m/fold-0', logits: true}}")
    run_folds(config, sets[0], ["m"], [0])
    return config


@contextlib.contextmanager
def moved_away(folder: Path) -> Iterator[None]:
    folder.rename(folder.with_name("elsewhere"))
    yield
    folder.with_name("elsewhere").rename(folder)


def tower_of(config: Experiment) -> JoinedTower:
    tower = load_tower(config.folder / FOLDER, TrainedNetwork.read(config.fold_folder("m", 0)).tower)
    assert isinstance(tower, JoinedTower)
    return tower


def test_tokens_from_photos_are_those_of_the_cache(sets, run):
    record, tower = TrainedNetwork.read(run.fold_folder("m", 0)).tower, tower_of(run)
    assert record.token_shape.parts == (256, 256, 256, 4) and record.width == 772
    model = run.models["m"]
    data = open_inputs(run, model, sets[0], start_inference("fp32"), recorded_tower(run, model, record))
    cache, rows = data.loaders.source.cache, np.arange(6)
    photos = LoaderFactory(sets[0], PhotoSource(sets[0], record.image_size, record.mean, record.std))
    batch = next(iter(photos.sequential(rows, 6, torch.device("cpu")))).micro_batches[0]
    for number, view in enumerate(("clinical", "dermoscopic")):
        cached = cache.numbers(rows, number, "plain")
        computed = FrozenTower(tower)(getattr(batch, view)).numpy()
        assert np.allclose(cached, computed, rtol=1e-4, atol=1e-4)
        own, other, again, logits = np.split(cached, np.cumsum(record.token_shape.parts)[:-1], 2)
        assert np.array_equal(other, again) and not np.allclose(own, other)
        assert np.allclose(np.exp(logits).sum(2), 1, atol=1e-5)


def test_logits_are_those_of_the_auxiliary_head(other, run):
    """By the other run's own network, from pixels, without concepts and metadata."""
    source = other / "m" / "fold-0"
    from triderm_dist.engine.trained_network import TrainedNetwork
    from triderm_dist.models import build_towers

    trained = TrainedNetwork.read(source)
    towers = build_towers(trained.config.tower, trained.signature.views)
    network = build_network(trained.config, trained.signature, towers).eval()
    network.load_state_dict(read_weights(source / "weights"))
    pixels, present = torch.randn(3, 3, 32, 32), torch.tensor([False, True]).expand(3, -1)
    tables = [torch.full((3, len(each)), torch.nan) for each in (trained.info["concepts"], trained.signature.fields)]
    with torch.no_grad():
        expected = network(torch.zeros(3, 0), pixels, present, *tables).aux_dermoscopic.log_softmax(1)
        given = FrozenTower(tower_of(run))(pixels)[:, 0, -4:]
    assert torch.allclose(given, expected, atol=1e-2)  # of tokens that passed float16


def test_fold_records_where_its_towers_are_from_and_needs_that_run_no_more(sets, other, run):
    fold = run.fold_folder("m", 0)
    first, second = read_info(fold / "fold")["extra_towers"]
    assert first["network"] == second["network"] == "m/fold-0" and [first["logits"], second["logits"]] == [False, True]
    before, source = result_hash(run, sets[0], "m", 0), run.folder.parent / "source"
    with moved_away(source):
        assert is_fold_finished(run, sets[0], "m", 0) and result_hash(run, sets[0], "m", 0) == before
        with pytest.raises(ConfigError, match=r"models\.m\.extra_towers\.0: .*no such run"):
            result_hash(run, sets[0], "m", 1)
    plain = joined(sets[0], run.folder, f"{{init: '{source}/m'}}", f"{{init: '{source}/m'}}")
    moved = joined(sets[0], run.folder, f"{{init: '{other}/m'}}", f"{{init: '{other}/m', logits: true}}")
    assert result_hash(moved, sets[0], "m", 0) == before != result_hash(plain, sets[0], "m", 0)


@pytest.mark.slow
def test_predictions_refit_and_export_take_all_towers(sets, run, tmp_path):
    run_folds(run, sets[0], ["m"], [1])
    refit(run, sets[0], ["m"])
    folders = run.refit_folder("m"), run.fold_folder("m", 0), run.fold_folder("m", 1)
    record, *others = (TrainedNetwork.read(folder).tower for folder in folders)
    assert others == [record, record]
    test = pack_set(tmp_path / "test", MAIN, 6, 500)
    with moved_away(run.folder.parent / "source"):
        predict_test(run, test, ["m"])
        predict_test(run, test, ["m"], "refit")
    assert np.isfinite(read_predictions(run.refit_folder("m") / "test.parquet").logits).all()
    network = build_network(run.models["m"], sets[0].signature, record.token_shape)
    load_weights(run.refit_folder("m") / "weights", network)
    network.add_tower(FrozenTower(tower_of(run)))
    write_network(tmp_path / "m.pt2", ExportedNetwork(network.eval(), "softmax", 32), "torch_export")


def test_each_tower_has_its_own_components(sets, run):
    weights = read_weights(run.fold_folder("m", 0) / "weights")
    basis = weights["views.dermoscopic.basis"]
    assert basis.shape == (772, 3 * 96 + 4)
    own = torch.block_diag(*(torch.ones(width, min(width, 96)) for width in (256, 256, 256, 4)))
    assert (basis[own == 0] == 0).all() and all(part.any() for part in basis.split([256, 256, 256, 4]))


def test_run_that_has_seen_the_lesions_is_refused(sets, other, tmp_path):
    config = joined(sets[1], tmp_path / "run", f"{{init: '{other}/m'}}")
    with pytest.raises(DataError, match=r"extra_towers.0: .*: m/fold-0 was trained on lesions.*OL0"):
        run_folds(config, sets[1], ["m"], [0])


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("models.m.kind=trimodal", "models.m.extra_towers: a network of kind trimodal reads all tokens"),
        ("models.m.tower.image_size=64", "extra_towers.0: the tower of .* takes photos with image_size 32"),
    ],
)
def test_towers_that_cannot_stand_side_by_side_are_refused(sets, other, tmp_path, word, text):
    config = joined(sets[0], tmp_path / "run", f"{{init: '{other}/m'}}", words=[word])
    with pytest.raises(ConfigError, match=text) as error:
        run_folds(config, sets[0], ["m"], [0])
    assert "\n" not in str(error.value)


def test_logits_of_a_network_that_reads_all_tokens_are_refused(sets, tmp_path):
    tuned = TOWER % ", frozen: true, shared: true"
    source = experiment(sets[1], tmp_path / "tri", f"{{kind: trimodal, width: 16, heads: 2, tower: {tuned}}}")
    run_folds(source, sets[1], ["m"], [0])
    save(source, source.folder / CONFIG_FILE)
    config = joined(sets[0], tmp_path / "run", f"{{init: '{source.folder}/m', logits: true}}")
    with pytest.raises(ConfigError, match=r"extra_towers.0: .*: logits: a network of kind trimodal does not classify"):
        run_folds(config, sets[0], ["m"], [0])


def test_doctor_names_the_networks(sets, other):
    config = joined(sets[0], Path("unused"), f"{{init: '{other}/m'}}", "{init: nowhere}")
    findings = {each.name: each for each in network_findings(config, sets[0].signature, Hardware(1, "single", None))}
    assert "m/fold-0" in findings["m: extra_towers.0"].text
    assert findings["m: extra_towers.1"].state == "error"


def test_tower_that_trains_has_none_beside_it(tmp_path):
    with pytest.raises(ConfigError, match="extra_towers are joined with a frozen tower"):
        load(Experiment, None, ["models.m={extra_towers: [{init: x}]}"])


def test_bench_measures_the_network_that_reads_all_towers(sets, other, tmp_path, capsys):
    words = ["seconds=0.01", f"record={tmp_path / 'records.json'}"]
    bench.main(joined(sets[0], tmp_path / "run", f"{{init: '{other}/m'}}", words=words, of=bench.BenchRun))
    assert "joined with the tower of" in " ".join(capsys.readouterr().out.split())
    caches = list((tmp_path / "run" / "bench" / "tokens").glob("*-mean"))
    assert len(caches) == 2 and not (tmp_path / "run" / FOLDER).exists()
