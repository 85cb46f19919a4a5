"""Optional packages, the extras of pip that install them, and the message where one is missing.

Imports no package, so that the message can be shown where none is installed.
"""

from __future__ import annotations

import importlib.util
import sys

from triderm_dist.schema import InputError

EXTRA_OF: dict[str, str] = {
    "deepspeed": "deepspeed",
    "transformers": "deepspeed",
    "ray": "search",
    "optuna": "search",
    "xgboost": "stack",
    "sklearn": "stack",
    "aiohttp": "remote",
    "s3fs": "remote",
    "gcsfs": "remote",
    "tensorboard": "track",
    "wandb": "track",
    "mlflow": "track",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "openvino": "cpu",
    "cv2": "cpu",
    "openpyxl": "excel",
    "pillow_heif": "photos",
}
"""The extra of triderm-dist that installs an optional package, by the package's import name."""

CORE: tuple[str, ...] = (
    *("PIL", "accelerate", "huggingface_hub", "jinja2", "matplotlib", "numpy", "open_clip", "pandas", "psutil"),
    *("pyarrow", "pydantic", "rich", "safetensors", "scipy", "simplejpeg", "timm", "torch", "webdataset", "yaml"),
)
"""Import names of the packages that triderm-dist always needs."""


DEEPSPEED = ("deepspeed", "transformers")
"""Import names of what Accelerate needs to run DeepSpeed."""


class MissingPackage(InputError, ModuleNotFoundError):
    """An optional package is not installed. Its text: what needs it, and the command that installs it."""


def is_installed(name: str) -> bool:
    """Return whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def require(what: str, *names: str, instead: str = "") -> None:
    """Raise MissingPackage unless the optional packages with these import names are installed.

    what: the feature or setting that needs them, for the message.  instead: what to do without them, for the message.
    Imports none of them: some take seconds.
    """
    for name in names:
        if not is_installed(name):
            otherwise = f", or {instead}" if instead else ""
            raise MissingPackage(f"{what} needs {name}; {install_command(name)}{otherwise}")


def install_command(name: str) -> str:
    """Return the command that installs the package with this import name."""
    return f"pip install 'triderm-dist[{EXTRA_OF[name]}]'" if name in EXTRA_OF else f"pip install {name}"


def explain(error: ModuleNotFoundError) -> str | None:
    """Return a line for a failed import of a package of `EXTRA_OF` or `CORE`; None for others (a bug)."""
    name = (error.name or "").partition(".")[0]
    if name in EXTRA_OF:
        return f"this needs {name}; {install_command(name)}"
    if name in CORE:
        return (
            f"{name} is not installed for {sys.executable}: activate the environment of triderm-dist "
            "(. .venv/bin/activate), or install it (pip install triderm-dist)"
        )
    return None
