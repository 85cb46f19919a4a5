"""A run as a Python object: photos of every kind, missing values, refusals, threads, attention, plain networks."""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import triderm_dist
from tests.conftest import Challenge, draw_photo
from tests.inference.small_run import train
from tests.inference.small_tower import SMALL_TOWER
from tests.processes import HANG_SECONDS, ROOT
from tests.small_tasks import TASKS
from triderm_dist.commands.predict import PredictRun
from triderm_dist.commands.predict import main as predict
from triderm_dist.commands.stack import StackRun
from triderm_dist.commands.stack import main as stack
from triderm_dist.config import load
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.engine.network_files import read_info, save_weights, write_info
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.inference.run import Run
from triderm_dist.models.towers import TOWER_SOURCES
from triderm_dist.predictions import average_test, read_predictions
from triderm_dist.schema import VIEWS, InputError

SCORES = {"clinical/hair": 0.25, "dermoscopic/hair": 0.5}


@pytest.fixture(scope="module")
def run(trained_run) -> Run:
    return triderm_dist.load(trained_run.folder, device="cpu")


@pytest.fixture(scope="module")
def photos(trained_run) -> tuple[Path, Path]:
    """The clinical and the dermoscopic photo of a lesion."""
    return trained_run.test.photo(0), trained_run.test.photo(1)


def as_png(path: Path, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.open(path).convert(mode).save(file, "PNG")
    return file.getvalue()


def test_predictions_equal_those_of_the_program(trained_run, run, tmp_path):
    """Packed, predicted by each network and combined by `triderm predict`, or one by one from files."""
    folder = tmp_path / "run"
    shutil.copytree(trained_run.folder, folder)
    dataset = read_challenge(trained_run.test.folder)
    pack_shards(dataset, tmp_path / "test", short_side=None)
    predict(load(PredictRun, None, [f"run={folder}", f"data.test_shards={tmp_path / 'test'}", "submit=false"]))
    parts = [read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet"))]
    expected = FittedEnsemble.load(folder).predict(average_test(parts), parts)[0]
    assert len(expected.lesion_ids) == 10
    for lesion in dataset.lesions:
        row = list(expected.lesion_ids).index(lesion.lesion_id)
        fields = {
            field.name: field.cell(value) for field, value in zip(run.fields, lesion.metadata, strict=True)
        }  # missing ones are None
        concepts = dict(zip(dataset.concepts, lesion.concepts, strict=True))
        found = run.predict(**lesion.images, concepts=concepts, lesion_id=lesion.lesion_id, **fields)
        assert found.lesion_id == lesion.lesion_id
        np.testing.assert_allclose(list(found.probabilities.values()), expected.probabilities[row], atol=1e-6)
        assert list(found.decisions.values()) == expected.decisions[row].tolist()
        assert set(found.members) == {"tri", "cnn", "stack"} == set(run.members)
        for member in found.members.values():
            assert sum(member.values()) == pytest.approx(1)


def test_no_other_network_is_loaded_where_one_predicts_alone(trained_run, run, photos, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained_run.folder, folder)
    stack(load(StackRun, None, [f"run={folder}", "ensemble.use=cnn"]))
    shutil.rmtree(folder / "tri")
    alone = triderm_dist.load(folder, device="cpu")
    assert alone.members == ("cnn",) and repr(alone).endswith("2 networks>")
    found, expected = alone.predict(*photos), run.predict(*photos)
    assert found.probabilities == found.members["cnn"] == pytest.approx(expected.members["cnn"], abs=1e-6)
    assert alone.predict_table(trained_run.test.folder).columns.str.startswith("cnn/").sum() == len(run.diagnoses)
    alone.export(tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert not [name for name in archive.namelist() if "stack" in name or name.startswith("tri/")]
    assert triderm_dist.load(tmp_path / "run.zip", device="cpu").predict(*photos) == found


def test_a_photo_may_be_of_any_kind(run, photos):
    """A path, bytes, a Pillow image of any mode, an array: the same pixels give the same answer."""
    clinical, dermoscopic = photos
    expected = run.predict(clinical, dermoscopic, age=60).probabilities
    for photo in (str(clinical), clinical.read_bytes(), bytearray(clinical.read_bytes())):
        assert run.predict(photo, dermoscopic, age=60).probabilities == expected
    # Pixels without a JPEG are encoded as packing encodes a PNG.
    expected = run.predict(as_png(clinical)).probabilities
    image = Image.open(clinical)
    pixels = np.asarray(image)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    for photo in (image, image.convert("RGBA"), pixels, opaque, pixels.copy(order="F")):
        assert run.predict(photo).probabilities == expected
    gray = run.predict(as_png(clinical, "L")).probabilities
    for photo in (image.convert("L"), np.asarray(image.convert("L")), np.asarray(image.convert("L"))[..., None]):
        assert run.predict(photo).probabilities == gray != expected


def test_anything_may_be_left_out(run, photos):
    clinical, dermoscopic = photos
    complete = run.predict(
        clinical, dermoscopic, concepts=dict.fromkeys(run.concepts, 0.5), age=50, sex="male", skin_tone=2, site="trunk"
    )
    assert complete.warnings == ()
    assert "predicted" in str(complete) and str(complete).count("\n") == len(run.diagnoses) - 1
    assert run.predict(dermoscopic=dermoscopic).warnings == (
        "no clinical photo", "missing: age, sex, skin tone, site", "missing: 14 of 14 concept scores"
    )  # fmt: skip
    assert run.predict(clinical, dermoscopic, concepts=SCORES, age=50, sex="", site=None).warnings == (
        "missing: sex, skin tone, site", "missing: 12 of 14 concept scores"
    )  # fmt: skip
    nothing = run.predict()
    assert nothing.warnings[2] == "no photo at all: no network was trained on such lesions"
    assert sum(nothing.probabilities.values()) == pytest.approx(1)
    assert "warning: no photo at all" in str(nothing)


def test_warnings_name_what_is_unlike_the_training_set(run, photos):
    tiny = Image.open(photos[0]).resize((16, 12))
    warnings = run.predict(tiny, photos[1], age=110, skin_tone=5.0, site="hand").warnings
    assert "the clinical photo is only 16 x 12 pixels; the run was trained on larger ones" in warnings[0]
    assert any("age 110 years is outside of what the run was trained on, 5 years to" in text for text in warnings)


def test_values_are_read_as_in_a_table(run, photos):
    expected = run.predict(*photos, age=60, sex="male", site="trunk", concepts=SCORES).probabilities
    for fields in (
        {"age": "60", "sex": "Male", "site": "TRUNK"},
        {"age_approx": 60.0, "Sex": "male", "site": "trunk"},
        {"age": np.float32(60), "sex": "male", "site": "trunk"},
    ):
        scores = {"MONET_clinical/hair": "0.25", "dermoscopic/HAIR": "0,5"}
        assert run.predict(*photos, concepts=scores, **fields).probabilities == expected
    unknown = run.predict(*photos, age=pd.NA, sex=float("nan"))
    assert unknown.probabilities == run.predict(*photos).probabilities


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agee": 60}, "agee: no field of task 'milk10k'; did you mean 'age'?"),
        ({"dermoscopy": "a.jpg"}, "dermoscopy: no field .* did you mean 'dermoscopic'?"),
        ({"age": 600}, "age: age_approx '600' is not a number from 0 to 120 years; leave it out if unknown"),
        ({"age": 60, "age_approx": 61}, "age_approx: given twice, also as age; remove one"),
        ({"sex": "mail"}, "sex: unknown sex 'mail'; did you mean 'male'?"),
        (
            {"concepts": {"clinical/hare": 1}},
            "concepts: unknown concept 'clinical/hare'; did you mean 'clinical/hair'?",
        ),
        ({"concepts": {"clinical/hair": 2}}, "concepts: clinical/hair '2' is not a score from 0 to 1"),
        ({"clinical": "nowhere.jpg"}, "clinical: nowhere.jpg: no such file"),
        ({"clinical": b"GIF89a"}, "the clinical photo of lesion new: unreadable photo"),
        ({"clinical": np.zeros((4, 4, 3))}, r"pixels must be .* uint8, got \(4, 4, 3\) float64"),
        ({"clinical": 7}, "a photo is a path, bytes, an image or an array, not int"),
        ({"clinical": str(ROOT)}, "is a folder, not a file"),
        ({"concepts": [0.5]}, "concepts: must be {name: score}, not list"),
        ({"tta": 3}, "tta=3: must be 1, 2, 4 or 8 transforms"),
    ],
)
def test_wrong_input_is_refused_in_one_line(run, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        run.predict(**arguments)
    assert "\n" not in str(error.value)


def test_threads_share_a_run(trained_run):
    """Four threads open the networks of one run at the same time, and each gets the answers of one thread."""
    run = triderm_dist.load(trained_run.folder, device="cpu")
    photos = [trained_run.test.photo(row) for row in range(20)]
    pairs = list(zip(photos[::2], photos[1::2], strict=True))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: run.predict(*pair, age=40).probabilities, pairs * 2))
    alone = [run.predict(*pair, age=40).probabilities for pair in pairs]
    for found, expected in zip(together, alone * 2, strict=True):
        assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-6)
    assert together[0] != together[1]


def test_the_working_directory_may_change(trained_run, run, photos, monkeypatch):
    monkeypatch.chdir(trained_run.folder.parent)
    relative = triderm_dist.load(trained_run.folder.name, device="cpu")
    monkeypatch.chdir("/")
    assert relative.predict(*photos).probabilities == run.predict(*photos).probabilities


def test_fewer_transforms_are_another_mean(run, photos):
    one, two = (run.predict(*photos, tta=tta).probabilities for tta in (1, 2))
    assert one != two != run.predict(*photos).probabilities == run.predict(*photos, tta=8).probabilities


def test_plain_networks_compute_what_the_run_predicts(run, photos):
    assert [(each.model, each.fold) for each in run.networks()] == [("tri", 0), ("tri", 1), ("cnn", 0), ("cnn", 1)]
    assert [(each.model, each.fold) for each in run.networks("cnn", fold=1)] == [("cnn", 1)]
    logits = []
    for each in run.networks("cnn"):
        pixels = [each.preprocess(photo)[None] for photo in photos]
        assert pixels[0].shape == (1, 3, 32, 32)
        present = torch.ones(1, len(VIEWS), dtype=torch.bool)
        concepts, metadata = torch.full((1, 14), torch.nan), torch.full((1, 4), torch.nan)
        with torch.no_grad():
            logits.append(each.network(*pixels, present, concepts, metadata).logits[0])
    temperature = dict(zip(run.members, run._run.fitted.ensemble.temperatures, strict=True))["cnn"]
    expected = run.predict(*photos, tta=1).members["cnn"]
    found = torch.softmax(torch.stack(logits).mean(0).double() / temperature, 0)
    assert found.tolist() == pytest.approx(list(expected.values()), abs=1e-6)
    with pytest.raises(InputError, match=r"model=cn: did you mean 'cnn'?"):
        run.networks("cn")
    with pytest.raises(InputError, match="fold=2: cnn has the folds 0 to 1"):
        run.networks("cnn", fold=2)
    with pytest.raises(InputError, match=r"the photo cannot be read \(no such file"):
        each.preprocess("nowhere.jpg")


def test_attention_maps_of_given_photos(run, photos):
    maps = run.explain(*photos, age=60)
    assert list(maps) == ["tri"]
    found = maps["tri"]
    assert found.models == 2 and set(found.photos) == set(VIEWS)
    assert found.photos["clinical"].shape == (32, 32, 3)
    assert found.values["age"] == "60 years" and found.values["sex"] == "missing"
    assert {view: part.sum() for view, part in found.attention.items()} == pytest.approx(dict.fromkeys(VIEWS, 1.0))
    assert set(run.explain(photos[0])["tri"].photos) == {"clinical"}


def test_importing_the_package_is_light():
    code = (
        "import sys, triderm_dist\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'pyarrow', 'PIL', 'timm'} & set(sys.modules)\n"
        "assert not heavy and callable(triderm_dist.load), heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr


def test_settings_of_the_machine_may_be_given(trained_run, run, photos):
    other = triderm_dist.load(trained_run.folder, device="cpu", precision="bf16", batch=2)
    found, expected = other.predict(*photos).probabilities, run.predict(*photos).probabilities
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=0.02) and found != expected
    for setting, message in {
        "precision": "precision=foo: known are auto, fp32, bf16, fp16",
        "batch": "batch=foo: must be a number of lesions, 1 or more",
        "networks": "networks=foo: known are folds, refit",
    }.items():
        with pytest.raises(InputError, match=message):
            triderm_dist.load(trained_run.folder, **{setting: "foo"})
    with pytest.raises(InputError, match="batch=0: must be"):
        triderm_dist.load(trained_run.folder, batch=0)
    with pytest.raises(InputError, match="format=foo: known are zip, hub, onnx, torch_export"):
        run.export("foo.zip", "foo")
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        triderm_dist.load(trained_run.folder, device="cpu", precision="fp16").predict(*photos)


def test_incomplete_runs_are_refused(trained_run, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        triderm_dist.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        triderm_dist.load(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(trained_run.folder, folder)
    (folder / "cnn" / "fold-1" / "fold.json").rename(tmp_path / "fold.json")
    with pytest.raises(InputError, match="fold-1: not trained; run triderm crossval first"):
        triderm_dist.load(folder)
    (tmp_path / "fold.json").rename(folder / "cnn" / "fold-1" / "fold.json")
    weights = folder / "cnn" / "fold-1" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run = triderm_dist.load(folder, device="cpu")
    with pytest.raises(InputError, match=r"weights\.safetensors: changed or damaged"):
        run.predict()
    digest = save_weights(weights.with_suffix(""), {"head.weight": torch.full((2,), torch.nan)}, epoch=1)
    write_info(weights.with_name("fold"), **{**read_info(weights.with_name("fold")), "weights": digest})
    with pytest.raises(InputError, match=r"weights\.safetensors: head\.weight has values that are not finite; delete"):
        triderm_dist.load(folder, device="cpu").predict()
    (folder / "ensemble.json").unlink()
    with pytest.raises(InputError, match=r"ensemble\.json: no such file; run triderm stack first"):
        triderm_dist.load(folder)


# --- zip files and the hub -------------------------------------------------------------------------------------------


def zip_of(folder: Path, path: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "shards" not in file.parts:
                archive.write(file, Path(inside) / file.relative_to(folder))
    return path


@pytest.mark.parametrize("inside", ["", "my-run"])
def test_a_zip_file_is_extracted_once(trained_run, run, photos, tmp_path, monkeypatch, inside):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = zip_of(trained_run.folder, tmp_path / "run.zip", inside)
    zipped = triderm_dist.load(path, device="cpu")
    assert zipped.predict(*photos).probabilities == run.predict(*photos).probabilities
    (extracted,) = (tmp_path / "cache" / "triderm-dist" / "runs").iterdir()
    assert zipped.folder == extracted / inside
    before = (zipped.folder / "config.yaml").stat().st_mtime_ns
    assert triderm_dist.load(path, device="cpu").folder == zipped.folder
    assert (zipped.folder / "config.yaml").stat().st_mtime_ns == before


def test_dangerous_zip_files_are_refused(trained_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "run.zip"
    for name in ("../outside", "/outside", "a/../../outside", "c:/outside", "a\\..\\..\\outside"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "text")
        with pytest.raises(InputError, match="which leaves the folder of a run"):
            triderm_dist.load(path)
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(InputError, match="which leaves the folder of a run"):
        triderm_dist.load(path)
    path.write_bytes(b"PK no zip")
    with pytest.raises(InputError, match=r"run\.zip: not a zip file"):
        triderm_dist.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(InputError, match=r"holds no config\.yaml"):
        triderm_dist.load(path)


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [("plugins: []", "plugins: [evil.py]", "plugins"), ("allow_commands: false", "allow_commands: true", "commands")],
)
def test_a_zip_file_runs_no_code(trained_run, tmp_path, monkeypatch, before, after, key):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = (trained_run.folder / "config.yaml").read_text()
    assert before in config
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("config.yaml", config.replace(before, after))
    with pytest.raises(InputError, match=rf"may run code of others \(.*{key}\)"):
        triderm_dist.load(tmp_path / "run.zip")


# --- tables ----------------------------------------------------------------------------------------------------------


def frame_of(run: Run, test: Challenge, lesions: int) -> pd.DataFrame:
    """Return a DataFrame with a row per lesion: its id, photos, age and sex."""
    clinical, dermoscopic = test.metadata[: 2 * lesions : 2], range(1, 2 * lesions, 2)
    return pd.DataFrame(
        {
            "lesion_id": [row["lesion_id"] for row in clinical],
            "clinical": [str(test.photo(row - 1)) for row in dermoscopic],
            "dermoscopic": [str(test.photo(row)) for row in dermoscopic],
            "age": [None if row["age_approx"] == "" else float(row["age_approx"]) for row in clinical],
            "sex": [row["sex"] for row in clinical],
        }
    )


@pytest.mark.parametrize("kind", ["frame", "csv"])
def test_a_table_is_predicted_as_its_lesions_are(trained_run, run, tmp_path, kind):
    table: pd.DataFrame | Path
    table = frame = frame_of(run, trained_run.test, 9)
    if kind == "csv":
        table = tmp_path / "lesions.csv"
        frame.to_csv(table, index=False)
    with pytest.warns(UserWarning, match="no column for skin tone, site, concept scores"):
        found = run.predict_table(table, tta=2)
    members = [f"{member}/{name}" for member in run.members for name in run.diagnoses]
    assert list(found.columns) == ["lesion_id", *run.diagnoses, "decision", *members]
    assert found["lesion_id"].tolist() == frame["lesion_id"].tolist()
    for row, lesion in enumerate(frame.itertuples()):
        one = run.predict(lesion.clinical, lesion.dermoscopic, age=lesion.age, sex=lesion.sex, tta=2)
        assert found.loc[row, list(run.diagnoses)].tolist() == pytest.approx([*one.probabilities.values()], abs=1e-6)
        assert found.loc[row, "stack/MEL"] == pytest.approx(one.members["stack"]["MEL"], abs=1e-6)
        assert found.loc[row, "decision"].split(";") == [name for name, yes in one.decisions.items() if yes]


def test_paths_of_a_table_and_rows_that_cannot_be_used(trained_run, run, tmp_path):
    frame = frame_of(run, trained_run.test, 4)
    frame["clinical"] = [Path(path).name for path in frame["clinical"]]
    frame.loc[1, "age"] = 600
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    frame.loc[2, "dermoscopic"] = str(tmp_path / "broken.jpg")
    folder = trained_run.test.folder
    with pytest.raises(InputError, match=r"DataFrame, row 1: .*'600' is not a number"):
        run.predict_table(frame, photos=folder)
    with pytest.raises(InputError, match="DataFrame: has two columns 'age'; rename or remove one"):
        run.predict_table(pd.concat([frame, frame["age"]], axis=1), photos=folder)
    frame = frame.convert_dtypes()
    frame["sex"] = frame["sex"].where(frame.index != 3)  # pandas.NA
    with pytest.warns(UserWarning) as warned:
        found = run.predict_table(frame, photos=folder, invalid="drop", tta=1)
    assert found["lesion_id"].tolist() == frame["lesion_id"][[0, 3]].tolist()
    assert sum("left out: " in str(each.message) for each in warned) == 2
    one = run.predict(trained_run.test.photo(0), trained_run.test.photo(1), age=frame.age[0], sex=frame.sex[0], tta=1)
    assert found.loc[0, list(run.diagnoses)].tolist() == pytest.approx([*one.probabilities.values()], abs=1e-6)


# --- the hub ---------------------------------------------------------------------------------------------------------

FROM_HUB = """
import sys, triderm_dist
from triderm_dist.schema import InputError
run = triderm_dist.load("hf-hub:some-user/lesions", device="cpu")
print(run.folder.name, run.predict(sys.argv[1], sys.argv[2]).probabilities["MEL"])
assert triderm_dist.load("hf-hub:some-user/lesions@main").folder == run.folder
for name in ("some-user/other", "no name"):
    try:
        triderm_dist.load(f"hf-hub:{name}")
    except InputError as error:
        print(error)
"""


def test_a_repository_of_the_hub_is_a_run(trained_run, run, photos, tmp_path):
    """From the hub's own cache on this machine, without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some-user--lesions"
    shutil.copytree(trained_run.folder, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("shards"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = subprocess.run(
        [sys.executable, "-c", FROM_HUB, *map(str, photos)], cwd=ROOT, capture_output=True, text=True,
        timeout=HANG_SECONDS, env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, other, wrong = done.stdout.splitlines()
    name, probability = first.split()
    assert name == commit and float(probability) == pytest.approx(run.predict(*photos).probabilities["MEL"], abs=1e-6)
    assert other.startswith("hf-hub:some-user/other: cannot be downloaded (")
    assert "hf download some-user/other on a machine with one, copy the folder, and give its path" in other
    assert wrong == "hf-hub:no name: not a repository; write hf-hub:USER/NAME or hf-hub:USER/NAME@REVISION"


# --- other tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dermoscopic only", "photos only"])
def test_a_task_may_have_fewer_inputs(tmp_path, monkeypatch, name):
    monkeypatch.setitem(TOWER_SOURCES, "small", SMALL_TOWER)
    task = TASKS[name]
    run = triderm_dist.load(train(tmp_path, task=task), device="cpu")
    assert run.views == task.view_names and bool(run.concepts) == bool(task.concept_names)
    photo = draw_photo(0, (64, 64))
    given = dict.fromkeys(run.views, photo)
    found = run.predict(**given, **({"age": 50, "limb": "no"} if task.fields else {}))
    assert list(found.probabilities) == list(run.diagnoses)
    gaps = len(run.concepts)
    assert found.warnings == ((f"missing: {gaps} of {gaps} concept scores",) if gaps else ())
    assert set(run.explain(**given)["trimodal"].photos) == set(run.views)
    if "clinical" not in run.views:
        with pytest.raises(InputError, match="clinical: task 'small' has no such photo; it has dermoscopic"):
            run.predict(clinical=photo)
    if not task.fields:
        with pytest.raises(InputError, match="age: no field of task 'small'"):
            run.predict(**given, age=50)
    if not run.concepts:
        with pytest.raises(InputError, match="unknown concept 'veil'; the task has none"):
            run.predict(**given, concepts={"veil": 1})
    for each in run.networks(fold=0):
        pixels = {view: each.preprocess(photo)[None] for view in run.views}
        images = [pixels.get(view, torch.empty(1, 0)) for view in VIEWS]
        present = torch.tensor([[view in pixels for view in VIEWS]])
        values = [torch.full((1, len(part)), torch.nan) for part in (run.concepts, run.fields)]
        with torch.no_grad():
            assert each.network(*images, present, *values).logits.shape == (1, 3)
