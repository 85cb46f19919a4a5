"""A zip and a hub folder hold what predicting needs and nothing else; a network's file holds what was trained."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.inference.small_run import train
from tests.inference.small_tower import SIZE, SMALL_TOWER
from tests.processes import written_meanwhile
from tests.small_tasks import TASKS
from tests.test_commands import commands_in
from triderm_dist import load
from triderm_dist.cli import read_settings
from triderm_dist.commands.export import ExportRun, main
from triderm_dist.commands.predict import PredictRun
from triderm_dist.commands.predict import main as predict
from triderm_dist.config import CONFIG_DIR, Experiment, load_run
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.locate import locate_run
from triderm_dist.engine.network_files import read_info, save_weights, write_info
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.files import file_sha256
from triderm_dist.inference.export import export_run
from triderm_dist.inference.exported_network import ExportedNetwork
from triderm_dist.inference.networks import NetworkLoader
from triderm_dist.inference.run_folder import open_run_folder
from triderm_dist.inference.slim_run import safe_name
from triderm_dist.models.towers import TOWER_SOURCES
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import InputError

DOCS = Path(__file__).parents[2] / "docs" / "exporting.md"
FOLDS = [f"{model}/fold-{fold}" for model in ("dual_cnn", "trimodal") for fold in (0, 1)]
HEAD = ("format", "version")
FILES = {
    *("README.md", "config.yaml", "ensemble.json", "field_values.json", "stack.json", "stack.ubj"),
    *(f"{fold}/{file}" for fold in FOLDS for file in ("fold.json", "weights.json", "weights.safetensors")),
}


@pytest.fixture(scope="module", autouse=True)
def small_tower():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOWER_SOURCES, "small", SMALL_TOWER)
        yield


@pytest.fixture(scope="module")
def run(small_tower, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the run, to change."""
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints", "tokens")))


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def towers_of(run: Path) -> set[str]:
    """Name the files of both towers: a record of each, and the weights of the frozen one."""
    frozen, trained = (TrainedNetwork.read(run / model / "fold-0").tower.name for model in ("trimodal", "dual_cnn"))
    return {f"towers/{frozen}.json", f"towers/{frozen}.safetensors", f"towers/{trained}.json"}


def test_zip_has_the_files_that_predicting_needs(run, tmp_path):
    export_run(run, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert set(archive.namelist()) == FILES | towers_of(run) and archive.namelist() == sorted(archive.namelist())
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        contents = {name: archive.read(name) for name in archive.namelist()}
    for name in contents.keys() - {"README.md", "config.yaml", "field_values.json"}:
        assert contents[name] == (run / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    for name, content in contents.items():
        assert str(run.parent).encode() not in content, name  # no path of this machine
        assert b"lesion-000" not in content, name  # no id of a lesion


def test_zip_of_a_copy_has_the_same_bytes(run, copied, tmp_path):
    export_run(run, tmp_path / "a.zip")
    export_run(copied, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_settings_of_an_export_are_those_of_the_run_in_its_own_folder(run, tmp_path):
    export_run(run, tmp_path / "hub", "hub")
    before, after = load_run(Experiment, run), load_run(Experiment, tmp_path / "hub")
    assert yaml.safe_load((tmp_path / "hub/config.yaml").read_text())["output"] == CONFIG_DIR
    assert after.folder == tmp_path / "hub" and before.data.shards and not after.data.shards
    for name in ("models", "stack", "predict", "seed"):
        assert getattr(after, name) == getattr(before, name)
    assert after.data.folds == before.data.folds


def test_hub_folder_has_a_card_with_metadata(run, copied, tmp_path):
    export_run(run, tmp_path / "hub", "hub", license_name="cc-by-4.0")
    assert names_in(tmp_path / "hub") == FILES | towers_of(run)
    _, head, body = (tmp_path / "hub/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["license"] == "cc-by-4.0" and card["library_name"] == "triderm-dist"
    assert card["pipeline_tag"] == "image-classification" and "small" in card["tags"] and "base_model" not in card
    assert body.startswith("\n# small\n") and "**" in body and "| `field_values.json` |" in body
    for absent in ("oof.parquet", "ensemble_oof.parquet", "report.html", "shards/"):
        assert absent not in body, absent  # the card is about the files that the export has
    export_run(tmp_path / "hub", tmp_path / "again", "hub", license_name="mit")
    text = (tmp_path / "again/README.md").read_text()
    assert text.endswith(f"---\n{body}") and text.count("license: ") == 1


def test_export_of_an_earlier_version_adds_what_its_run_did_not_record(run, copied, tmp_path):
    for fold in FOLDS:
        info = read_info(copied / fold / "fold")
        write_info(copied / fold / "fold", **{key: info[key] for key in info.keys() - {"tower", "photos", *HEAD}})
    shutil.rmtree(copied / "towers")
    export_run(copied, tmp_path / "hub", "hub")
    for fold in FOLDS:
        assert read_info(tmp_path / "hub" / fold / "fold") == read_info(run / fold / "fold")
    for path in (run / "towers").iterdir():
        assert (tmp_path / "hub/towers" / path.name).read_bytes() == path.read_bytes()
    assert open_run_folder(tmp_path / "hub").canvas == open_run_folder(run).canvas


def test_refitted_networks_are_exported_too(copied, tmp_path):
    shutil.copytree(copied / "dual_cnn/fold-0", copied / "refit/dual_cnn")
    info = read_info(copied / "refit/dual_cnn/fold")
    weights = [read_info(copied / f"dual_cnn/fold-{fold}/weights")["sha256"] for fold in (0, 1)]
    write_info(copied / "refit/dual_cnn/fold", **{key: info[key] for key in info.keys() - {*HEAD}}, refit_of=weights)
    export_run(copied, tmp_path / "hub", "hub")
    files = names_in(tmp_path / "hub/refit")
    assert files == {f"dual_cnn/{file}" for file in ("fold.json", "weights.json", "weights.safetensors")}
    write_info(copied / "refit/dual_cnn/fold", **{key: info[key] for key in info.keys() - {*HEAD}}, refit_of=["0" * 64])
    with pytest.raises(InputError, match="was fitted on other weights of dual_cnn"):
        export_run(copied, tmp_path / "other", "hub")


def test_incomplete_or_changed_run_is_refused(copied, tmp_path):
    def refused(message: str, **options) -> None:
        with pytest.raises(InputError, match=message):
            export_run(copied, tmp_path / "a.zip", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    fold = copied / "dual_cnn/fold-1"
    content = (fold / "weights.safetensors").read_bytes()
    (fold / "weights.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("dual_cnn/fold-1/weights.safetensors: changed or damaged")
    other = save_weights(fold / "weights", {"other": torch.zeros(1)}, epoch=1, validation=None)
    refused("dual_cnn/fold-1/weights.safetensors: changed or damaged")
    info = read_info(fold / "fold")
    write_info(fold / "fold", **{**{key: info[key] for key in info.keys() - {*HEAD}}, "weights": other})
    refused("was fitted on other weights of dual_cnn")
    (fold / "weights.json").write_text("{")
    refused("dual_cnn/fold-1/weights.json: damaged or cut off")
    (fold / "fold.json").unlink()
    refused("dual_cnn/fold-1: not trained; run triderm crossval first")
    (copied / "ensemble.json").unlink()
    refused("ensemble.json: no such file; run triderm stack first")


def test_unknown_network_is_refused(run, tmp_path):
    for options, message in (
        ({"kind": "onnx", "models": ["late"]}, "models=late: the ensemble has the networks trimodal, dual_cnn"),
        ({"kind": "torch_export", "folds": [2]}, "folds=2: trimodal has the folds 0 to 1"),
        ({"kind": "onnx", "folds": [0], "networks": "refit"}, "folds: a refit has one network per model"),
        ({"kind": "onnx", "networks": "refit"}, "refit/trimodal: not trained; run triderm refit first"),
        ({"models": ["trimodal"]}, "models, folds, networks: format=zip has all networks"),
        ({"license_name": "mit"}, "license=mit: format=zip names no license; remove it, or set format=hub"),
    ):
        with pytest.raises(InputError, match=message):
            export_run(run, tmp_path / "a.zip", **options)
        assert not list(tmp_path.iterdir())


def test_output_that_exists_is_refused_and_kept(run, tmp_path):
    (tmp_path / "a.zip").write_text("mine")
    with pytest.raises(InputError, match=r"a.zip: exists; remove it, or set another output"):
        export_run(run, tmp_path / "a.zip")
    with pytest.raises(InputError, match=r"output=.*/a: the name of a zip file must end with .zip"):
        export_run(run, tmp_path / "a")
    assert (tmp_path / "a.zip").read_text() == "mine"


def test_output_that_another_process_writes_meanwhile_is_kept(run, tmp_path, capsys):
    output = tmp_path / "a.zip"
    refused = pytest.raises(InputError, match=r"a.zip: exists; remove it, or set another output")
    with written_meanwhile(output, lambda: output.write_text("theirs"), capsys), refused:
        export_run(run, output)
    assert output.read_text() == "theirs" and list(tmp_path.iterdir()) == [output]


def test_output_that_is_a_symbolic_link_is_written_where_it_leads(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    export_run(run, tmp_path / "link", "hub")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"] and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("name", ["../a", "/a", "a/../b", "a\\b", "c:a", ".a", "a.", "a ", "a?", "a\n", "", "a//b"])
def test_unsafe_name_is_refused(name):
    with pytest.raises(InputError, match="rename the model"):
        safe_name(name)


def test_safe_name_is_kept():
    for name in ("trimodal/fold-0/weights.safetensors", "a b", "Netz_2.0", "été"):
        assert str(safe_name(name)) == name


@pytest.mark.parametrize("model", ["trimodal", "dual_cnn"])
def test_exported_network_predicts_what_the_fold_predicted(run, model):
    """The tower of trimodal is frozen."""
    compare_with_folds(run, model)


def compare_with_folds(run: Path, model: str) -> None:
    """Map the pixels of held-out lesions to the outputs in predictions.parquet."""
    opened = open_run_folder(run)
    loaded = NetworkLoader(opened, torch.device("cpu"), "fp32").load(model, share=False)
    index = read_index(opened.experiment.train_shards)
    row_of = {lesion: row for row, lesion in enumerate(index.lesion_ids)}
    for fold in (0, 1):
        network = ExportedNetwork.of(loaded, fold)
        predicted = read_predictions(run / model / f"fold-{fold}/predictions.parquet")
        rows = np.array([row_of[lesion] for lesion in predicted.lesion_ids])
        size, mean, std, frame = loaded.preprocessing
        loaders = LoaderFactory(index, PhotoSource(index, size, mean, std, frame=frame))
        (step,) = loaders.sequential(rows, len(rows), torch.device("cpu"))
        batch = step.micro_batches[0]
        with torch.no_grad():
            outputs = network(*(getattr(batch, name) for name in network.inputs))
        named = dict(zip(network.outputs, outputs, strict=True))
        for name in ("logits", "aux_clinical", "aux_dermoscopic", "features"):
            np.testing.assert_allclose(named[name].numpy(), getattr(predicted, name), atol=1e-5)


@pytest.mark.slow
def test_network_trained_with_lora_is_exported_as_any_other(small_tower, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tower = "{source: 'timm:test_vit', pretrained: false, image_size: 32, freeze_clinical: 1, lora: {rank: 2}}"
    model = f"{{width: 16, heads: 2, tower: {tower}, train: {{epochs: 3, optim: {{lr: 1e-2, min_lr: 1e-3}}}}}}"
    folder = train(tmp_path, [f"models.vit={model}", "stack.enabled=false"])
    compare_with_folds(folder, "vit")
    run, photo = load(folder), tmp_path / "a.jpg"
    Image.new("RGB", (80, 60), (200, 120, 90)).save(photo)
    run.export(tmp_path / "a.zip")
    expected, found = (each.predict(photo, age=50) for each in (run, load(tmp_path / "a.zip")))
    assert found.probabilities == expected.probabilities
    for kind in ("onnx", "torch_export"):  # each file is compared with PyTorch when it is written
        export_run(folder, tmp_path / kind, kind, folds=[1])
        about = json.loads((tmp_path / kind / "vit.fold-1.json").read_text())
        assert about["weights"] == read_info(folder / "vit/fold-1/weights")["sha256"]
        assert about["checked"]["largest_difference"] <= 1e-4


def test_description_of_a_network_is_that_of_its_run(run, tmp_path):
    lines: list[str] = []
    export_run(run, tmp_path / "out", "torch_export", models=["dual_cnn"], folds=[1], report=lines.append)
    assert names_in(tmp_path / "out") == {"dual_cnn.fold-1.pt2", "dual_cnn.fold-1.json"}
    about = json.loads((tmp_path / "out/dual_cnn.fold-1.json").read_text())
    ensemble = Ensemble.load(run / "ensemble.json")
    assert about["sha256"] == file_sha256(tmp_path / "out/dual_cnn.fold-1.pt2")
    assert (about["model"], about["fold"], about["head"]) == ("dual_cnn", 1, "sigmoid")
    assert about["weights"] == read_info(run / "dual_cnn/fold-1/weights")["sha256"]
    assert about["temperature"] == ensemble.temperatures[ensemble.members.index("dual_cnn")]
    assert [each["name"] for each in about["diagnoses"]] == ["mole", "melanoma", "wart"]
    assert about["preprocessing"]["size"] == SIZE and about["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    canvas = read_index(load_run(Experiment, run).train_shards).canvas
    assert about["preprocessing"]["canvas"] == [*canvas] and len(about["preprocessing"]["steps"]) == 5
    assert about["ensemble"]["weights"].keys() == set(ensemble.members)
    assert about["ensemble"]["networks"] == 2 and about["ensemble"]["transforms"] == 2
    assert about["checked"]["largest_difference"] <= 1e-4
    assert lines[0].startswith("dual_cnn.fold-1.pt2: outputs differ from PyTorch's by at most")
    module = torch.export.load(tmp_path / "out/dual_cnn.fold-1.pt2").module()
    loaded = NetworkLoader(open_run_folder(run), torch.device("cpu"), "fp32").load("dual_cnn", share=False)
    network = ExportedNetwork.of(loaded, 1, about["temperature"])
    for one, other in zip(module(*network.example(5)), network(*network.example(5)), strict=True):
        torch.testing.assert_close(one, other)


def test_zip_and_hub_folder_predict_as_the_run(trained_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run, photos = load(trained_run.folder), sorted(trained_run.test.folder.rglob("*.jpg"))[:2]
    run.export("~/a.zip")
    run.export(tmp_path / "hub", "hub")
    expected = run.predict(*photos, age=119)
    assert any("is outside of what the run was trained on" in warning for warning in expected.warnings)
    for exported in ("a.zip", "hub"):
        shown = [f"~/{os.path.relpath(photo, tmp_path)}" for photo in photos]
        found = load(tmp_path / exported).predict(*shown, age=119)
        assert found.probabilities == expected.probabilities and found.members == expected.members
        assert found.diagnosis == expected.diagnosis and found.warnings == expected.warnings


def test_predict_takes_a_zip(trained_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_run(trained_run.folder, tmp_path / "a.zip")
    contents = []
    for number, run in enumerate((trained_run.folder, tmp_path / "a.zip")):
        words = [f"run={run}", f"input={trained_run.test.folder}", f"output={tmp_path / str(number)}", "tta=1"]
        predict(read_settings(PredictRun, words, locate=locate_run))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert contents[0] == contents[1] and contents[0].keys() >= {"probabilities.parquet", "submission.csv"}
    export_run(locate_run(tmp_path / "a.zip"), tmp_path / "b.zip")
    assert (tmp_path / "b.zip").read_bytes() == (tmp_path / "a.zip").read_bytes()


def test_documented_script_takes_a_network_with_fewer_inputs(tmp_path, monkeypatch):
    """One of a task with one view, and without concepts and fields."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (80, 60), (200, 120, 90)).save(name)
    run = train(tmp_path, task=TASKS["dermoscopic photos only"])
    export_run(run, Path("onnx"), "onnx", models=["trimodal"], folds=[0])
    printed: list[dict[str, float]] = []
    (script,) = (text for text in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "onnxruntime" in text)
    exec(script, {"print": printed.append})
    assert sum(printed[0].values()) == pytest.approx(1)


def test_documented_commands_work(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (80, 60), (200, 120, 90)).save(name)
    commands = [shlex.split(line) for line in commands_in(DOCS) if line.startswith("triderm export ")]
    assert {"zip", "hub", "onnx", "torch_export"} == {
        dict(word.split("=") for word in words[2:]).get("format", "zip") for words in commands
    }
    for words in commands:
        if "networks=refit" not in words:
            main(read_settings(ExportRun, [word.replace("=RUN", f"={run}") for word in words[2:]]))
    scripts = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    printed: list[dict[str, float]] = []
    for script in scripts:
        exec(script, {"print": printed.append})
    assert Path("again.zip").read_bytes() == Path("lesions.zip").read_bytes()
    assert printed[0].keys() == {"mole", "melanoma", "wart"} and sum(printed[0].values()) == pytest.approx(1)
