"""Networks as ONNX and `torch.export` files with any number of lesions, compared with PyTorch when they are written."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triderm_dist.files import naming_file
from triderm_dist.inference.exported_network import ExportedNetwork
from triderm_dist.runtime.extras import require
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import InputError

BATCHES = (1, 2, 7)
"""Numbers of lesions with which a file is compared with PyTorch."""
TOLERANCE = 1e-4
"""Largest accepted |a - b| / max(1, |b|) of an output a of the file, b of PyTorch."""

BATCH = "batch"
"""Name of the first axis of every input and output."""
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
"""Ending of a network's file by format."""

NetworkFunction = Callable[[Sequence[torch.Tensor]], Sequence[np.ndarray]]
"""A function from a network's inputs to its outputs."""


def check_installed(kind: str) -> None:
    """Raise InputError where a package that writes or checks this format is not installed."""
    if kind == "onnx":
        require("format=onnx", "onnx", "onnxscript", "onnxruntime")


def write_network(path: Path, network: ExportedNetwork, kind: str) -> float:
    """Write a network as `kind` of `SUFFIXES`, compare the file with PyTorch, return the largest difference.

    The difference is |a - b| / max(1, |b|) over all outputs of `BATCHES` of random lesions with missing values. Raises
    InputError, without leaving a file, if it is over `TOLERANCE` or the network cannot be exported.
    """
    write, read = (_write_onnx, _read_onnx) if kind == "onnx" else (_write_program, _read_program)
    try:
        with _quiet():
            try:
                write(path, network)
            except OSError:
                raise
            except Exception as error:  # the exporters raise many types
                reason = one_line(error, 160, with_type=True)
                raise InputError(f"{path.name}: torch.export cannot export this network ({reason})") from None
            largest = largest_difference(read(path), network)
        if not largest <= TOLERANCE:  # NaN too
            raise InputError(
                f"{path.name}: its outputs differ from PyTorch's by {largest:.1e}, more than {TOLERANCE:.0e}; "
                "it was not kept"
            )
    except BaseException:
        for file in path.parent.glob(f"{path.name}*"):  # with the separate weights of a large ONNX file
            file.unlink()
        raise
    return largest


def largest_difference(run: NetworkFunction, network: ExportedNetwork) -> float:
    """Return the largest |a - b| / max(1, |b|) of a file's outputs a and PyTorch's b over `BATCHES` random lesions."""
    largest = 0.0
    for lesions in BATCHES:
        inputs = network.example(lesions, seed=lesions)
        with torch.no_grad():
            expected = [output.numpy() for output in network(*inputs)]
        for actual, value in zip(run(inputs), expected, strict=True):
            if actual.shape != value.shape:
                return float("inf")
            difference = np.abs(actual - value) / np.maximum(1.0, np.abs(value))
            largest = float(np.maximum(largest, difference.max()))  # keeps NaN
    return largest


def _program(network: ExportedNetwork) -> torch.export.ExportedProgram:
    batch = torch.export.Dim(BATCH, min=1)
    shapes = ({0: batch},) * len(network.inputs)
    with torch.no_grad():
        return torch.export.export(network, network.example(3), dynamic_shapes={"inputs": shapes}, strict=False)


def _write_program(path: Path, network: ExportedNetwork) -> None:
    content = io.BytesIO()  # PyTorch ends the process when it writes to a full disk
    torch.export.save(_program(network), content)
    with naming_file(path):
        path.write_bytes(content.getbuffer())


def _read_program(path: Path) -> NetworkFunction:
    module = torch.export.load(path).module()

    def run(inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(*inputs)]

    return run


def _write_onnx(path: Path, network: ExportedNetwork) -> None:
    axes = {"inputs": ({0: BATCH},) * len(network.inputs)}  # only names the axis: the program is exported already
    program = torch.onnx.export(
        _program(network), input_names=list(network.inputs), output_names=list(network.outputs), dynamo=True,
        dynamic_shapes=axes, verbose=False,
    )  # fmt: skip
    assert program is not None
    with naming_file(path):
        program.save(path)


def _read_onnx(path: Path) -> NetworkFunction:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' messages on stdout, stderr and in warnings."""
    logger, text = logging.getLogger("torch.onnx"), io.StringIO()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def versions(kind: str) -> dict[str, Any]:
    """Return the versions of the packages that wrote and checked a file."""
    names = ("torch", "onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ("torch",)
    return {name: importlib.import_module(name).__version__ for name in names}
