"""Tokens of frozen towers on CPUs: every backend computes those of plain PyTorch, or is not used."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from torch import Tensor, nn

from triderm_dist.models import cpu_tower
from triderm_dist.models.cpu_tower import TOLERANCE, TORCH_BATCH, CpuTower, OpenVino, fold_batch_norms
from triderm_dist.models.open_clip_tower import rebuild_open_clip
from triderm_dist.models.panderm import build_panderm, split_panderm
from triderm_dist.models.timm_tower import split_model
from triderm_dist.models.tower import InputSpec, Tower
from triderm_dist.runtime.extras import is_installed

needs_openvino = pytest.mark.skipif(not is_installed("openvino"), reason="needs OpenVINO")
SIDE = 64
SPEC = InputSpec(SIDE, (0.5,) * 3, (0.5,) * 3)
OPEN_CLIP = {
    "quick_gelu": None,
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"width": 8, "heads": 1, "layers": 1, "vocab_size": 9, "context_length": 5},
    },
}


def small_tower(name: str) -> Tower:
    """Return a frozen tower with random weights and random statistics of its batch norms."""
    torch.manual_seed(0)
    if name == "panderm":
        tower = split_panderm(build_panderm(64, 2, 16, SIDE), SPEC, None, "")
    elif name == "open_clip":
        tower = rebuild_open_clip(OPEN_CLIP, SIDE)
    else:
        model = timm.create_model(name, num_classes=0)
        own = InputSpec(model.pretrained_cfg["input_size"][-1], SPEC.mean, SPEC.std)
        tower = split_model(model, name, own, SIDE, "")
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.1)
    tower.freeze(len(tower.blocks))
    return tower.eval()


def photos(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator).contiguous(memory_format=torch.channels_last)


def difference(tokens: Tensor, expected: Tensor) -> float:
    return float((tokens - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "test_resnet", "test_convnext", "test_vit", "panderm", "open_clip"]
)
@pytest.mark.parametrize(
    "installed", [pytest.param(True, marks=needs_openvino, id="openvino"), pytest.param(False, id="torch")]
)
def test_tokens_are_those_of_plain_pytorch(name: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tower, "is_installed", lambda package: installed)
    tower, x, lines = small_tower(name), photos(2 * TORCH_BATCH + 1), list[str]()
    encoder = CpuTower(tower, lines.append)
    tokens = encoder(x)
    with torch.no_grad():
        assert difference(tokens, tower(x)) <= TOLERANCE
    assert tokens.shape == (len(x), *tower.token_shape) and not tokens.requires_grad
    (line,) = lines
    assert ("by OpenVINO" if installed else "by PyTorch in small batches") in line
    assert ("triderm-dist[cpu]" in line) == (not installed)


def test_all_batch_norms_of_a_cnn_are_folded() -> None:
    tower = small_tower("test_efficientnet")
    encoder = fold_batch_norms(tower, photos(1))
    (copied,) = (cell.cell_contents for cell in encoder.__closure__ if isinstance(cell.cell_contents, Tower))
    folded = [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not folded and any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())


@needs_openvino
def test_openvino_tokens_depend_on_no_batch_and_no_number_of_threads() -> None:
    tower, x, threads = small_tower("test_efficientnet"), photos(5), torch.get_num_threads()
    tokens = OpenVino(tower, x[:1])(x)
    try:
        torch.set_num_threads(3)
        other = OpenVino(tower, x[:1])
        assert torch.equal(torch.cat([other(x[:2]), other(x[2:])]), tokens)
    finally:
        torch.set_num_threads(threads)
    assert sys.modules["openvino_telemetry"] is None


class Bessel(nn.Module):
    """A function that OpenVINO does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@needs_openvino
def test_a_tower_that_does_not_convert_is_computed_by_pytorch() -> None:
    tower, x, lines = small_tower("test_efficientnet"), photos(3), list[str]()
    tower.blocks.append(Bessel())
    tower.freeze(len(tower.blocks))
    with torch.no_grad():
        expected = tower(x)
    assert difference(CpuTower(tower, lines.append)(x), expected) <= TOLERANCE
    assert "by PyTorch in small batches" in lines[0] and "OpenVINO cannot compute it" in lines[0]


def test_a_backend_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution whose output is used before and after the norm must not include the norm."""
    monkeypatch.setattr(cpu_tower, "is_installed", lambda package: False)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            nn.init.uniform_(self.norm.weight, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.convolution(x)
            return x + self.norm(x)

    tokens = (SIDE - 2) ** 2
    tower = Tower(
        Residual(), [nn.Identity()], nn.Identity(), width=8, num_tokens=tokens, image_size=SIDE, mean=SPEC.mean,
        std=SPEC.std, layout="NCHW",
    ).eval()  # fmt: skip
    x, lines = photos(3), list[str]()
    with torch.no_grad():
        expected = tower(x)
    torch.testing.assert_close(CpuTower(tower, lines.append)(x), expected)
    assert "by plain PyTorch" in lines[0] and "differs by" in lines[0]
