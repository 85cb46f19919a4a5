"""Compute the tokens of a frozen tower on CPU cores, in fp32, faster than PyTorch's eager mode.

Chooses the fastest installed backend whose tokens agree with PyTorch's on some of the photos:

1. OpenVINO (extra `cpu`): one photo at a time on each core, so that activations stay in its cache and tokens depend on
   no batch size and no number of cores;
2. PyTorch with batch norms folded into the convolutions before them, in small batches;
3. PyTorch in eager mode.

docs/cpu.md and benchmarks/results name backends that were measured to be slower or inexact.
"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triderm_dist.runtime.extras import install_command, is_installed
from triderm_dist.runtime.messages import one_line

MIN_PHOTOS = 256
"""Number of photos from which a faster backend saves more than its start-up, about one CPU second."""
CHECKED = 4
"""Number of photos on which a backend is compared with PyTorch."""
TOLERANCE = 1e-4
"""Largest allowed difference from PyTorch's tokens, relative to the largest absolute value."""
TORCH_BATCH = 4
"""Photos per forward pass of PyTorch; activations of 32 exceed the caches, and take up to twice as long per photo."""

Encoder = Callable[[Tensor], Tensor]


class CpuTower:
    """Map pixels (B, 3, H, W) float32 on the CPU to a frozen tower's tokens (B, L, width) float32, without autograd.

    Or to the output (B, ...) of the frozen blocks of a tower.

    The first call chooses the backend, with its first photos. Safe to use from several threads.
    """

    def __init__(self, tower: nn.Module, report: Callable[[str], None]) -> None:
        """tower: in evaluation mode, on the CPU.  report: is called with one line on the choice."""
        self.tower, self.report = tower, report
        self._compute: Encoder | None = None
        self._lock = threading.Lock()

    def __call__(self, pixels: Tensor) -> Tensor:
        with self._lock, torch.inference_mode(), torch.autocast("cpu", enabled=False):
            if self._compute is None:
                self._compute = self._choose(pixels[:CHECKED])
            return self._compute(pixels)

    def _choose(self, photos: Tensor) -> Encoder:
        expected = self.tower(photos)
        backends: list[tuple[str, Callable[[nn.Module, Tensor], Encoder]]] = [
            ("PyTorch in small batches", fold_batch_norms)
        ]
        hint = f"; {install_command('openvino')} makes it faster"
        if is_installed("openvino"):
            backends, hint = [("OpenVINO", OpenVino), *backends], ""
        for name, build in backends:
            try:
                with torch.inference_mode(False), torch.no_grad():
                    encoder = build(self.tower, photos)
                difference = _difference(encoder(photos), expected)
            except Exception as error:  # converters raise many types for operations that they do not support
                hint += f"; {name} cannot compute it ({one_line(error, 160, with_type=True)})"
                continue
            if difference <= TOLERANCE:
                self.report(
                    f"frozen tower: computed by {name}, tokens within {difference:.0e} of plain PyTorch's{hint}"
                )
                return encoder
            hint += f"; {name} differs by {difference:.0e}"
        self.report(f"frozen tower: computed by plain PyTorch{hint}")
        return in_batches(self.tower)


class OpenVino:
    """A tower compiled by OpenVINO for photos of one size: each core computes whole photos, one after the other."""

    def __init__(self, tower: nn.Module, photos: Tensor) -> None:
        """photos: (B, 3, H, W), of that size. Raises OpenVINO's error for a tower that it cannot convert."""
        # OpenVINO sends usage data to its vendor when imported, unless this package is missing.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino
        from openvino.preprocess import PrePostProcessor

        example = photos[:1].clone(memory_format=torch.contiguous_format)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns of sizes that become constants
            traced = torch.jit.freeze(torch.jit.trace(tower, example, check_trace=False))
            shape = openvino.PartialShape(list(example.shape))
            model = openvino.convert_model(traced, example_input=example, input=[shape])
        layout = PrePostProcessor(model)  # reads channels-last pixels without a copy
        layout.input().tensor().set_layout(openvino.Layout("NHWC"))
        layout.input().model().set_layout(openvino.Layout("NCHW"))
        threads = torch.get_num_threads()
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",  # the default is bf16 on CPUs that support it
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # pinning would put all ranks of a machine on the same cores
        }
        compiled = openvino.Core().compile_model(layout.build(), "CPU", settings)
        self._shape = tuple(compiled.output(0).shape)[1:]
        self._queue = openvino.AsyncInferQueue(compiled, 2 * threads)

    def __call__(self, pixels: Tensor) -> Tensor:
        photos = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        tokens = torch.empty(len(photos), *self._shape)
        out = tokens.numpy()

        def store(request: Any, row: int) -> None:
            out[row] = request.get_output_tensor(0).data[0]

        self._queue.set_callback(store)
        for row in range(len(photos)):
            self._queue.start_async({0: photos[row : row + 1]}, row, share_inputs=True)
        self._queue.wait_all()
        return tokens


def fold_batch_norms(tower: nn.Module, photos: Tensor) -> Encoder:
    """Return a copy of the tower with batch norms folded into the preceding convolutions, called in small batches.

    photos: (B, 3, H, W), with which the pairs are traced.
    """
    tower = copy.deepcopy(tower)
    convolutions: dict[int, nn.Conv2d] = {}
    outputs: list[Tensor] = []  # kept alive, so that ids are unique
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_convolution(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        convolutions[id(output)] = module
        outputs.append(output)

    def before_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if args and (convolution := convolutions.get(id(args[0]))):
            pairs.append((convolution, module))

    hooks = []
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    tower(photos[:1])
    for hook in hooks:
        hook.remove()
    folded: dict[nn.Module, nn.Module] = {}
    for convolution, norm in pairs:
        folded[convolution] = nn.utils.fuse_conv_bn_eval(convolution, norm)
        # timm's norms include what follows them.
        following = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        folded[norm] = nn.Sequential(*following)
    for parent in list(tower.modules()):
        for name, child in list(parent.named_children()):
            if child in folded:
                setattr(parent, name, folded[child])
    return in_batches(tower.to(memory_format=torch.channels_last).eval())


def in_batches(tower: nn.Module) -> Encoder:
    """Return a function that calls the tower with `TORCH_BATCH` photos at a time."""
    return lambda pixels: torch.cat([tower(part) for part in pixels.split(TORCH_BATCH)])


def _difference(tokens: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value; NaN if any value is not finite."""
    return float((tokens - expected).abs().max() / expected.abs().max())
