"""ONNX and `torch.export` files of every network compute what PyTorch computes, for any number of lesions."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.inference.small_tower import SIZE, SMALL_TOWER
from tests.small_tasks import TASKS
from triderm_dist.config import ModelConfig
from triderm_dist.inference.exported_files import SUFFIXES, check_installed, largest_difference, write_network
from triderm_dist.inference.exported_network import CONCEPTS, METADATA, PRESENT, ExportedNetwork, describe_network
from triderm_dist.inference.networks import FrozenTower
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.towers import TOWER_SOURCES
from triderm_dist.schema import VIEWS, InputError

KINDS = ("trimodal", "dual_cnn")
ALL = ("clinical", "dermoscopic", PRESENT, CONCEPTS, METADATA)
INPUTS = {
    "everything": ALL,
    "dermoscopic only": ("dermoscopic", PRESENT, CONCEPTS, METADATA),
    "no concepts": ("clinical", "dermoscopic", PRESENT, METADATA),
    "no fields": ("clinical", "dermoscopic", PRESENT, CONCEPTS),
    "dermoscopic photos only": ("dermoscopic", PRESENT),
}


@pytest.fixture(scope="module", autouse=True)
def small_tower():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOWER_SOURCES, "small", SMALL_TOWER)
        yield


def exported(kind: str, task: str = "everything", temperature: float = 0.5, **settings: Any) -> ExportedNetwork:
    """Return an untrained network, ready for export."""
    torch.manual_seed(0)
    tower = {"source": "small:", "pretrained": False, **settings.pop("tower", {})}
    config = ModelConfig.model_validate({"kind": kind, "tower": tower, "width": 16, "heads": 2, **settings})
    signature = TASKS[task].signature(TASKS[task].concept_names)
    towers = build_towers(config.tower, signature.views)
    frozen = config.tower.frozen
    network = build_network(config, signature, towers[0].token_shape if frozen else towers)
    if frozen:
        network.add_tower(FrozenTower(towers[0]))
    return ExportedNetwork(network, config.head, towers[0].image_size, temperature)


def lesions(number: int) -> dict[str, torch.Tensor]:
    """Return inputs of lesions of the task `everything`: all there, no clinical photo, no dermoscopic one, ..."""
    generator = torch.Generator().manual_seed(number)
    photos = torch.randn(2, number, 3, SIZE, SIZE, generator=generator)
    present = torch.tensor([[True, True], [False, True], [True, False], [False, False]]).repeat(2, 1)[:number]
    photos[:, ~present.T.any(0)] = 0
    concepts = torch.tensor([[0.2, 0.9, 0.0, 1.0], [torch.nan, 0.4, 0.5, torch.nan], [torch.nan] * 4]).repeat(3, 1)[
        :number
    ]
    metadata = torch.tensor([[50.0, 1.0], [torch.nan, 0.0], [17.0, torch.nan], [torch.nan] * 2]).repeat(2, 1)[:number]
    return dict(zip(ALL, (*photos, present, concepts, metadata), strict=True))


def outputs_of(network: ExportedNetwork, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: each.numpy() for name, each in zip(network.outputs, network(*inputs.values()), strict=True)}


@pytest.fixture(scope="module", params=KINDS)
def onnx(request, tmp_path_factory):
    """A network, and the session of its ONNX file."""
    import onnxruntime

    network = exported(request.param)
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    assert write_network(path, network, "onnx") < 1e-5
    return network, onnxruntime.InferenceSession(path)


def run_onnx(session: Any, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip([each.name for each in session.get_outputs()], outputs, strict=True))


@pytest.mark.parametrize("number", [1, 2, 7])
def test_onnx_computes_what_pytorch_computes(onnx, number):
    network, session = onnx
    inputs = lesions(number)
    expected, actual = outputs_of(network, inputs), run_onnx(session, inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-5)
    np.testing.assert_allclose(actual["probabilities"].sum(1), 1, atol=1e-6)


def test_onnx_describes_its_inputs_and_outputs(onnx):
    network, session = onnx
    description = describe_network(network)
    for key, listed in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        assert [each["name"] for each in description[key]] == [each.name for each in listed]
        assert [each["shape"] for each in description[key]] == [each.shape for each in listed]
        types = {"float32": "tensor(float)", "bool": "tensor(bool)"}
        assert [types[each["type"]] for each in description[key]] == [each.type for each in listed]
    columns = {each["name"]: each.get("columns") for each in description["inputs"]}
    assert columns[PRESENT] == ["clinical", "dermoscopic"] and columns[CONCEPTS] == [*TASKS["everything"].concept_names]
    assert [(each["name"], each.get("categories")) for each in columns[METADATA]] == [
        ("age", None), ("limb", ["no", "yes"])
    ]  # fmt: skip
    assert [each.get("columns") for each in description["outputs"]] == [["mole", "melanoma", "wart"]] * 4 + [None]


def test_pixels_of_a_missing_view_have_no_effect(onnx):
    _, session = onnx
    inputs = lesions(7)
    changed = {**inputs, "clinical": inputs["clinical"].clone()}
    changed["clinical"][~inputs[PRESENT][:, 0]] = 100.0
    for one, other in zip(run_onnx(session, inputs).values(), run_onnx(session, changed).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_exported_program_computes_what_pytorch_computes(tmp_path):
    network = exported("dual_cnn", tower={"frozen": True}, head="sigmoid")
    assert write_network(tmp_path / "network.pt2", network, "torch_export") < 1e-6
    module = torch.export.load(tmp_path / "network.pt2").module()
    for number in (1, 2, 7):
        inputs = lesions(number)
        for actual, expected in zip(module(*inputs.values()), outputs_of(network, inputs).values(), strict=True):
            np.testing.assert_allclose(actual.detach().numpy(), expected, atol=1e-6)


CASES = [
    ("trimodal", "everything", {"tower": {"source": "timm:test_vit", "image_size": 32}}),
    ("trimodal", "everything", {"tower": {"frozen": True}, "head": "sigmoid"}),
    ("trimodal", "everything", {"fusion": ["view_alignment"], "tower": {"shared": True}}),
    ("trimodal", "everything", {"fusion": ["semantic_gating"], "depth": 2}),
    ("trimodal", "dermoscopic only", {}),
    ("trimodal", "photos only", {}),
    ("trimodal", "everything", {"use": ["concepts", "metadata"]}),
    ("dual_cnn", "everything", {"tower": {"source": "timm:test_efficientnet", "image_size": 32, "shared": True}}),
    ("dual_cnn", "everything", {"tower": {"source": "timm:test_resnet", "image_size": 32, "freeze_dermoscopic": 2}}),
    ("dual_cnn", "everything", {"use": ["dermoscopic", "metadata"]}),
    ("dual_cnn", "clinical only", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize(("network", "task", "settings"), CASES)
def test_files_of_every_network(tmp_path, kind, network, task, settings):
    assert write_network(tmp_path / f"network{SUFFIXES[kind]}", exported(network, task, **settings), kind) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", INPUTS)
def test_inputs_are_those_that_the_network_uses(kind, task):
    network = exported(kind, task, temperature=2.0)
    assert network.inputs == INPUTS[task]
    example = network.example(5)
    given = dict(zip(network.inputs, example, strict=True))
    none = torch.zeros(5, 0)
    present = torch.zeros(5, 2, dtype=torch.bool)
    for column, view in enumerate(network.views):
        present[:, VIEWS.index(view)] = given[PRESENT][:, column]
    inputs = [given.get(view, none) for view in VIEWS]
    with torch.no_grad():
        expected = network.network(*inputs, present, given.get(CONCEPTS, none), given.get(METADATA, none))
        probabilities, logits, *others = network(*example)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(probabilities, (logits / 2.0).softmax(1))
    heads = [each for each in (expected.aux_clinical, expected.aux_dermoscopic) if each is not None]
    for one, other in zip(others, (*heads, expected.features), strict=True):
        torch.testing.assert_close(one, other)


def test_network_that_uses_no_view_has_no_pixels():
    network = exported("trimodal", use=["concepts", "metadata"])
    assert network.inputs == (CONCEPTS, METADATA)
    assert all(torch.isfinite(each).all() for each in network(*network.example(3)))


def test_example_has_missing_values_and_values_of_each_field():
    present, concepts, metadata = exported("trimodal").example(200)[2:]
    assert present.any() and not present.all() and concepts.isnan().any() and not concepts.isnan().all()
    ages, limbs = metadata.T
    assert ages.nan_to_num(50).min() >= 0 and 60 < ages.nan_to_num(50).max() <= 100
    assert set(limbs[~limbs.isnan()].tolist()) == {0.0, 1.0} and limbs.isnan().any()


class Counting(torch.nn.Module):
    """Depend on the number of calls: a file holds that of its export."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (x * self.calls).sin()


class Choosing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "message"),
    [(Counting(), "outputs differ from PyTorch's by"), (Choosing(), "torch.export cannot export this network")],
)
def test_network_that_a_file_cannot_hold_is_refused(tmp_path, module, message):
    network = exported("dual_cnn")
    for tower in network.network.towers.values():
        tower.tail = module
    with pytest.raises(InputError, match=message) as raised:
        write_network(tmp_path / "network.pt2", network, "torch_export")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_difference_is_relative_above_one_and_counts_nan_and_shapes():
    network = exported("dual_cnn", temperature=1e-6)
    run = lambda change: lambda inputs: [change(each.numpy()) for each in network(*inputs)]  # noqa: E731
    with torch.no_grad():
        assert largest_difference(run(lambda value: value), network) == 0
        assert largest_difference(run(lambda value: value + 0.01), network) == pytest.approx(0.01, rel=0.01)
        assert np.isnan(largest_difference(run(lambda value: np.where(value == value.max(), np.nan, value)), network))
        assert largest_difference(run(lambda value: value[:1]), network) == np.inf


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named(monkeypatch, package):
    check_installed("onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"^format=onnx needs {package}; pip install 'triderm-dist\[export\]'$"):
        check_installed("onnx")
    check_installed("torch_export")
