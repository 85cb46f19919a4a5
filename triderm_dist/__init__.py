"""Distributed multi-GPU training for skin-lesion diagnosis from paired clinical and dermoscopic photos."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triderm_dist.config import Networks
    from triderm_dist.inference.networks import Device, Precision
    from triderm_dist.inference.run import Run

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def load(
    run: str | os.PathLike[str],
    device: Device | None = None,
    precision: Precision | None = None,
    batch: int | None = None,
    networks: Networks = "folds",
) -> Run:
    """Open a trained run, to predict lesions with it.

    run: its folder, a zip file of it, or `hf-hub:USER/NAME` (`@REVISION` may follow).  device: such as `cpu` or
    `cuda:1`; None takes the GPU if there is one.  precision: fp32, bf16, fp16 or auto; None takes that of the run's
    settings.  batch: lesions in a forward pass; None takes that of the run's settings.  networks: `folds` averages the
    networks of all folds, `refit` takes the one network per model that `triderm refit` trained.

    Raises `schema.InputError`, in one line, if there is no complete run.
    """
    from triderm_dist.engine.locate import locate_run
    from triderm_dist.inference.run import Run
    from triderm_dist.inference.run_folder import open_run_folder

    return Run(open_run_folder(locate_run(run), networks), device, precision, batch)
