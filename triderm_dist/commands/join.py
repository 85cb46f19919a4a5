"""Join packed sets of one task, or take a part of one, without decoding photos.

triderm join runs/clinic_a/shards/train runs/clinic_b/shards/train output=runs/both/shards/train
triderm join runs/clinic_a/shards/train output=runs/faces/shards/train select='age >= 60 and has_clinical'

Sets may be behind URLs. Tars are linked, not copied, where the file system can. `select` compares the diagnosis,
metadata fields, concepts and `has_clinical`, `has_dermoscopic` with values: == != < <= > >= in (...), `is None`, and,
or, not, parentheses.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible, RemoteConfig
from triderm_dist.runtime.redact import redact
from triderm_dist.schema import ConfigError
from triderm_dist.settings import PathText


class JoinConfig(Extensible):
    sets: tuple[PathText, ...] = Field(min_length=1, description="folders or URLs of packed sets")
    output: PathText = Field(description="folder of the new set; it appears when it is complete")
    select: str | None = Field(None, max_length=2000, description="condition that lesions must meet; null: all")


def main(config: JoinConfig) -> None:
    import numpy as np

    from triderm_dist.data.select import select_rows
    from triderm_dist.data.shards.console import print_index, progress_bar
    from triderm_dist.data.shards.index import read_index
    from triderm_dist.data.shards.join import join_sets
    from triderm_dist.data.shards.open import has_tars, is_url, open_index

    if is_url(config.output):
        raise ConfigError(f"output={redact(config.output)}: not a local folder; join into one and upload it")
    sets = [read_index(each) if has_tars(each) else open_index(each, RemoteConfig()) for each in config.sets]
    keep = [select_rows(one, config.select) if config.select else np.ones(len(one), bool) for one in sets]
    with progress_bar("joining tars") as progress:
        index = join_sets(sets, keep, Path(config.output), config.select, progress)
    print_index(index)


def start() -> None:
    run(JoinConfig, main, __doc__, first="sets")


if __name__ == "__main__":
    start()
