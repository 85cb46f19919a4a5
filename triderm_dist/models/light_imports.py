"""Import timm without its slow dependencies that building and running a network do not need."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_UTILS = "torch._dynamo.utils"


def import_timm() -> None:
    """Import timm and torchvision without torch._dynamo, the compiler.

    They import it for one function and one decorator, which are replaced by functions that import it when called.
    """
    if "torch._dynamo" in sys.modules or "timm" in sys.modules:
        return
    import torch

    utils: Any = ModuleType(_UTILS)
    utils.is_compile_supported = _is_compile_supported
    disable = torch.compiler.disable
    sys.modules[_UTILS], torch.compiler.disable = utils, _disable  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):  # a tower that needs timm reports that it is missing
            import timm  # noqa: F401
            import torchvision.ops  # noqa: F401
    finally:
        torch.compiler.disable = disable
        del sys.modules[_UTILS]


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


def _disable(function: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> Any:
    """Apply torch.compiler.disable at the first call of the function."""
    if function is None:
        return functools.partial(_disable, **options)
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            import torch

            disabled.append(torch.compiler.disable(function, *arguments, **options))
        return disabled[0](*args, **kwargs)

    return call
