"""Compute on all ranks the thumbnails with which photos of several sets are compared (`data.overlap`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from accelerate import Accelerator

from triderm_dist.data.overlap import Thumbnails


def compute_thumbnails(
    sets: Sequence[Thumbnails], workers: int, accelerator: Accelerator, after_file: Callable[[], None]
) -> None:
    """Compute the missing files of thumbnails, distributed over the ranks. Call on all ranks.

    after_file: called on all ranks after each of them has computed a file, and may raise.
    """
    missing = [(thumbnails, number) for thumbnails in sets for number in thumbnails.missing()]
    accelerator.wait_for_everyone()  # no rank may write before all have listed what is missing
    if missing:
        accelerator.print("comparing the photos of the training set with those of other sets", flush=True)
    for start in range(0, len(missing), accelerator.num_processes):
        if (own := start + accelerator.process_index) < len(missing):
            thumbnails, number = missing[own]
            thumbnails.compute(number, workers)
        after_file()
    accelerator.wait_for_everyone()
