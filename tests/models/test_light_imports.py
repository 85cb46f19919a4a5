"""Towers are built without importing the compiler, which still works afterwards."""

import subprocess
import sys

import pytest

from tests.processes import ROOT

CODE = """
import sys
import torch
from triderm_dist.models.towers import build_tower

disable = torch.compiler.disable
build_tower("{source}", pretrained=False)
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules
assert torch.compiler.disable is disable

from timm.models import naflexvit
from torchvision.ops import roi_align as align

photos, boxes = torch.rand(1, 1, 8, 8), torch.tensor([[0.0, 0, 0, 8, 8]])
torch.use_deterministic_algorithms(True)
assert align(photos, boxes, 4).shape == (1, 1, 4, 4)
assert sys.modules[align.__module__].is_compile_supported("cpu") in (True, False)
assert "torch._dynamo" in sys.modules

from triderm_dist.models.light_imports import _disable

@_disable
def one(x): return x + 1

@_disable(recursive=False)
def two(x): return x + 2

compiled = torch.compile(lambda x: one(x) + two(x), backend="eager")
assert compiled(torch.tensor(1)) == 5 and one(torch.tensor(1)) == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["timm:test_efficientnet"])
def test_building_a_tower_imports_no_compiler(source):
    code = CODE.format(source=source)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
