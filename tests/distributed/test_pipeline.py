"""triderm pipeline: all stages from packing to the report, skipped if unchanged, killed and resumed."""

import csv
import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from tests.processes import finish, is_free, launch, start, wait_for, without_root
from tests.test_run_folder import hashes
from triderm_dist.config import Experiment, load, load_run
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.network_files import load_weights
from triderm_dist.ensemble.calibration import probabilities_of
from triderm_dist.environment import read_environment
from triderm_dist.metrics import official_macro_f1
from triderm_dist.models import build_network, build_towers
from triderm_dist.predictions import read_oof, read_predictions
from triderm_dist.schema import DIAGNOSES
from triderm_dist.submission import read_submission

from .test_resume import records

SETTINGS = """
data: {folds: 2}
train: {epochs: 2, global_batch: 16, micro_batch: 16, optim: {lr: 2e-3, warmup_epochs: 1}, augment: {token_variants: 1}}
models:
  tri:
    width: 32
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 0, freeze_dermoscopic: 0}
  frozen:
    kind: dual_cnn
    width: 32
    heads: 2
    tower: {source: "timm:test_efficientnet@WEIGHTS", image_size: 32, frozen: true, shared: true}
stack: {max_rounds: 20, extra: [features]}
ensemble: {use: ensemble, bootstrap: 50, rounds: 5}
predict: {transforms: 2}
"""


@pytest.fixture(scope="module")
def arguments(packed, tmp_path_factory) -> list[str]:
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("settings")
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), folder / "tower.safetensors")
    (folder / "tiny.yaml").write_text(SETTINGS.replace("WEIGHTS", str(folder / "tower.safetensors")))
    demo = packed.parent / "demo"
    return [
        "--config", str(folder / "tiny.yaml"), f"data.source={demo}/train", f"data.test={demo}/test",
        f"data.test_truth={demo}/truth/MILK10k_Test_GroundTruth.csv",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    result = launch("launch.pipeline", *arguments, f"output={folder}", environment={"COLUMNS": "80"})
    (folder / "terminal.txt").write_text(result.stdout)
    return folder


def test_every_line_fits_80_columns_and_is_in_the_log(done):
    lines = (done / "terminal.txt").read_text().splitlines()
    # A path may be longer, alone on its line.
    assert [line for line in lines if len(line.removesuffix(" \\")) > 80 and " " in line.strip().rstrip(" \\")] == []
    expected = (
        "[3/7] crossval", "  triderm crossval run=", "tri fold 0 (1 of 4)", "epoch 1/2  macro",
        "model   fold  macro F1    AUC  best epoch     time", "frozen   all", "held-out macro F1 (official) ",
    )  # fmt: skip
    assert [start for start in expected if not any(line.startswith(start) for line in lines)] == []
    log = [line for line in (done / "log.txt").read_text().splitlines() if line and not line.startswith("===")]
    assert sorted(log) == sorted(line.rstrip() for line in lines if line.strip())


def test_pipeline_writes_consistent_files(done, packed):
    for name in (
        "oof.parquet",
        "stack.ubj",
        "ensemble.json",
        "oof_submission.csv",
        "predictions.parquet",
        "report.html",
    ):
        assert (done / name).stat().st_size > 0
    ids, probabilities = read_submission(done / "submission.csv")
    assert len(ids) == 50
    with (packed.parent / "demo" / "truth" / "MILK10k_Test_GroundTruth.csv").open() as file:
        truth = {row["lesion_id"]: [float(row[name]) for name in DIAGNOSES].index(1.0) for row in csv.DictReader(file)}
    score = official_macro_f1(probabilities, np.array([truth[name] for name in ids]))
    assert json.loads((done / "heldout.json").read_text())["macro_f1"] == pytest.approx(score)
    record = read_environment(done)
    assert [each["program"] for each in record["starts"]] == ["crossval", "predict", "stack", "predict", "report"]
    assert {each["exit"] for each in record["starts"]} == {0}
    assert record["data"]["train"]["fingerprint"] == read_index(done / "shards" / "train").fingerprint
    assert record["data"]["train"]["synthetic"] and record["data"]["test"]["lesions"] == 50
    assert record["data"]["test"]["fingerprint"] in (done / "README.md").read_text()


def test_hidden_view_equals_missing_photo(done, packed):
    config = load(Experiment, done / "config.yaml")
    index, taken = read_index(packed), read_index(packed)
    sizes, scores = index.sizes.copy(), index.concept_scores.copy()
    sizes[:, 0] = 0
    scores[:, [name.startswith("clinical/") for name in index.concepts]] = np.nan
    assert index.sizes.all() and np.isfinite(index.concept_scores).any()
    vars(taken).update(sizes=sizes, concept_scores=scores)
    seen, plain = (
        read_predictions(done / "tri" / "fold-0" / f"{name}.parquet") for name in ("without_clinical", "predictions")
    )
    network = build_network(config.models["tri"], index.signature, build_towers(config.models["tri"].tower))
    load_weights(done / "tri" / "fold-0" / "weights", network)
    names = index.lesion_ids.tolist()
    rows = np.array([names.index(name) for name in seen.lesion_ids])
    tower = network.towers["clinical"]
    source = PhotoSource(taken, tower.image_size, tower.mean, tower.std)
    expected = evaluate(network, LoaderFactory(taken, source), rows, Accelerator(cpu=True), micro_batch=16)
    np.testing.assert_allclose(seen.logits, expected.logits, atol=1e-5)
    assert np.abs(seen.logits - plain.logits).max() > 1e-3
    assert "tri without the close-up photo" in (done / "report.html").read_text(encoding="utf-8")


def test_second_run_skips_all_stages(done, arguments):
    rewritten = (".lock", "config.yaml", "log.txt")
    before = {path: path.stat().st_mtime_ns for path in done.glob("*.*") if path.name not in rewritten}
    # parallel_folds is not an input of the stages.
    result = launch("launch.pipeline", *arguments, f"output={done}", "parallel_folds=true", "retries=0")
    assert result.stdout.count("skipped, inputs unchanged") == 7
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_moved_run_skips_all_stages(done, tmp_path):
    moved = shutil.copytree(done, tmp_path / "moved")
    result = launch("launch.pipeline", "run=moved", folder=tmp_path)
    assert result.stdout.count("skipped, inputs unchanged") == 7
    assert load_run(Experiment, moved).output == str(moved)


def test_run_without_its_photos_and_pretrained_file_answers_as_before(done, packed, tmp_path):
    """Moved, read-only, from another folder and another home, without photos, table and pretrained file."""
    lesion = read_submission(done / "submission.csv")[0][0]
    photo = next((packed.parent / "demo" / "test").glob("*_Input/*/*.jpg"))
    first = shutil.copytree(done, tmp_path / "first" / "run")
    settings = (first / "config.yaml").read_text()
    assert f"{packed.parent}/demo/train" in settings
    (first / "config.yaml").write_text(settings.replace(f"{packed.parent}/demo", f"{tmp_path}/deleted"))
    asked = {
        "explain": ("predict", f"explain={lesion}"),
        "predict": ("predict", f"input={photo}", "view=dermoscopic"),
        "report": ("report",),
        "export": ("export", "format=hub"),
    }
    for name, (program, *words) in asked.items():
        launch(f"triderm_dist.commands.{program}", "run=first/run", f"output=before/{name}", *words, folder=tmp_path)
    moved = tmp_path / "moved" / "run"
    first.parent.rename(moved.parent)
    pretrained = Path(load_run(Experiment, moved).models["frozen"].tower.source.partition("@")[2])
    for path in (*moved.rglob("*"), moved, moved.parent):
        path.chmod(path.stat().st_mode & ~0o222)
    before, away = hashes(moved), pretrained.with_name("away")
    pretrained.rename(away)
    try:
        environment = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        for name, (program, *words) in asked.items():
            words += [f"run={moved}", f"output={tmp_path}/after/{name}"]
            finished = without_root(program, *words, folder=Path("/"), environment=environment)
            assert finished.returncode == 0, finished.stderr
        printed = without_root("predict", "run=run", f"input={photo}", "view=dermoscopic", folder=moved.parent)
    finally:
        away.rename(pretrained)
    assert printed.returncode == 0 and f"\n{photo.stem}: " in printed.stdout, printed.stderr
    assert hashes(moved) == before
    written = hashes(tmp_path / "before")
    assert {name.partition("/")[0] for name in written} == set(asked) and hashes(tmp_path / "after") == written


def test_killed_pipeline_resumes(done, arguments, tmp_path):
    process = start("launch.pipeline", *arguments, f"output={tmp_path}")
    wait_for((tmp_path / "tri" / "fold-1" / "metrics.jsonl").exists, process)
    process.kill()
    process.wait()
    first = (tmp_path / "tri" / "fold-0" / "weights.safetensors").stat().st_mtime_ns
    wait_for(partial(is_free, tmp_path))
    result = launch("launch.pipeline", *arguments, f"output={tmp_path}")
    assert result.stdout.count("skipped, inputs unchanged") == 2
    assert (tmp_path / "tri" / "fold-0" / "weights.safetensors").stat().st_mtime_ns == first
    assert (tmp_path / "submission.csv").read_bytes() == (done / "submission.csv").read_bytes()


def test_sigint_waits_until_parallel_folds_have_saved(packed, tmp_path):
    (tmp_path / "tiny.yaml").write_text(SETTINGS.partition("  frozen:")[0])
    words = ["--config", str(tmp_path / "tiny.yaml"), f"data.shards={packed}", f"output={tmp_path}"]
    process = start(
        "launch.pipeline", *words, "train.epochs=500", "train.log_every=1", "cpus=1",
        environment={"OMP_NUM_THREADS": "2"}, errors=subprocess.STDOUT,
    )  # fmt: skip
    folds = [tmp_path / "tri" / f"fold-{fold}" for fold in range(2)]
    wait_for(lambda: all(len(records(fold)) > 5 for fold in folds), process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    text = finish(process).stdout
    assert process.returncode == 3 and "2 folds, 2 at once, each on 1 thread" in text, text
    for fold in folds:
        newest = max(int(path.name.split("-")[-1]) for path in fold.glob("checkpoints/epoch-*"))
        assert newest == records(fold)[-1]["step"]


def test_explain_draws_attention_of_the_predicting_models(done):
    table = read_oof(done / "oof.parquet")
    test_id = read_submission(done / "submission.csv")[0][0]
    train_id = str(table.lesion_ids[3])
    launch("launch.predict", "--config", str(done / "config.yaml"), f"explain=[{train_id},{test_id}]")
    for lesion, models in ((train_id, 1), (test_id, 2)):
        seen = json.loads((done / "explain" / "tri" / f"{lesion}.json").read_text())
        assert seen["models"] == models
        for part in (*seen["attention"].values(), seen["semantic"].values(), seen["probabilities"].values()):
            assert sum(part) == pytest.approx(1, abs=1e-4)
        assert (done / "explain" / "tri" / f"{lesion}.png").stat().st_size > 0
        if lesion == train_id:  # by the model of the fold that holds the lesion out
            expected = probabilities_of(table.logits["tri"][3][None], "softmax")[0]
            assert list(seen["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
    result = launch("launch.predict", "--config", str(done / "config.yaml"), "explain=[unknown]", check=False)
    assert result.returncode == 2 and "error: explain=unknown: no lesion" in result.stderr


def test_weights_of_a_different_architecture_are_refused(done, arguments):
    before = (done / "submission.csv").read_bytes()
    (done / "tri" / "fold-0" / "test.json").unlink(missing_ok=True)
    config = ["--config", str(done / "config.yaml")]
    result = launch("launch.predict", *config, "models.tri.width=64", check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1
    assert "weights.safetensors: weights of another architecture" in errors[0]
    assert (done / "submission.csv").read_bytes() == before


def test_changed_shard_is_refused(done, arguments):
    shard = next((done / "shards" / "train").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    result = launch("launch.train", "--config", str(done / "config.yaml"), "fold=0", check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1
    assert shard.name in errors[0]
