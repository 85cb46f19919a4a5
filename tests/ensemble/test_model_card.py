"""The model card of a run."""

import json
import re
from pathlib import Path

import pytest

from tests.ensemble.conftest import experiment
from tests.synthetic_run import CLINIC, write_run
from triderm_dist import cli
from triderm_dist.checksums import write_checked_json
from triderm_dist.config import Experiment, save
from triderm_dist.ensemble.artifact import read_artifact
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.ensemble.model_card import write_card
from triderm_dist.environment import record_data, record_program


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Experiment:
    folder = tmp_path_factory.mktemp("card") / "my*run"
    write_run(folder, 130, models=("trimodal",), task=CLINIC)
    config = experiment(folder, enabled=False)
    save(config, folder / "config.yaml")
    fit_ensemble(folder, config)
    return config


def card_of(config: Experiment) -> str:
    return write_card(config).read_text(encoding="utf-8")


def test_card_holds_the_scores_with_intervals_and_every_diagnosis(config):
    text = card_of(config)
    score = read_artifact(config.folder / "ensemble.json")["scores"]["ensemble"]["nested"]
    assert f"**{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})**" in " ".join(text.split())
    for row in ("| Nävus | nevus | no |", "| \\$x\\$ | in dollars |  |", "| [wart] | wart &amp; co | no |"):
        assert row in text
    assert text.count("| MEL&lt;em>1 |") == 2  # among the diagnoses, and with its F1
    assert "run.predict(clinical=\"clinical.jpg\", fototyp='I', n_lesions=248, smoker='yes')" in text
    assert "my\\*run" in text.splitlines()[0] and "On 20 lesions of a test set" not in text
    assert "fine-tuned or used from `hf-hub:redlessone/DermLIP_ViT-B-16`, CC BY-NC-ND 4.0" in text.replace("\n", " ")
    assert "Photos: as the owner of the training set says" in text
    for heading in ("How to use it", "Intended use", "Performance", "Limits", "Data", "Licenses", "Files"):
        assert f"\n## {heading}\n" in text


def test_card_names_the_test_score_the_data_and_the_stages(config):
    held_out = config.folder / "heldout.json"
    write_checked_json(held_out, {"macro_f1": 0.5, "interval": [0.4, 0.6], "argmax": 0.5, "n": 20, "absent": []})
    record_data(config.folder, "train", {"fingerprint": "abc123", "lesions": 140, "synthetic": True})
    with record_program(config.folder, "crossval", cli.exit_code):
        pass
    text = card_of(config)
    assert "On 20 lesions of a test set: **0.500 (0.400 to 0.600)**." in text
    assert "test lesions have the id" not in text
    assert "`abc123`" in text and "130 labeled lesions, of 140 packed." in text
    assert text.index("SYNTHETIC data") < 200 and "Photos: generated, no license." in text
    assert re.search(r"\| crossval \| \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| 0 \| \d+ cores of .* \| ", text)


def test_card_describes_environments_as_the_report_does(config):
    path = config.folder / "environment.json"
    record = {"format": "triderm-environment", "version": 1, "data": {}}
    made = {"gpus": ["NVIDIA H100"] * 8, "cpu": "AMD EPYC", "cores": 2, "ranks": 8, "commit": "0123456789abcdef-dirty"}
    starts = [{"program": "crossval", "started": "2026-11-25T10:00:00+00:00", "environment": 0}]  # no seconds
    path.write_text(json.dumps({**record, "environments": [{**made, "triderm-dist": "0.1.0"}], "starts": starts}))
    row = "| crossval | 2026-11-25 10:00:00 |  | 8 x NVIDIA H100, 8 ranks | 0.1.0 (0123456789ab, changed) |  |"
    assert row in card_of(config)
    path.unlink()


def test_card_lists_the_files_that_the_run_has(config):
    listed = re.findall(r"^\| `([^`]+)` \|", card_of(config), re.M)
    assert all(name == "MODEL/fold-K/" or (config.folder / name).exists() for name in listed)
    names = {path.name for path in Path(config.folder).iterdir() if path.is_file() and not path.name.startswith(".")}
    assert names - {"README.md"} <= set(listed)
