"""Check a folder of shards: checksums, index, every photo, and that plain `webdataset` reads the same samples.

python -m shards.verify folder=runs/milk10k/shards/train
"""

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Section


class VerifyConfig(Section):
    folder: str = Field(description="folder of shards")
    workers: int = Field(2, ge=1, description="decoder threads")


def main(config: VerifyConfig) -> None:
    from rich.progress import Progress

    from triderm_dist.data.shards import read_index, verify_samples

    index = read_index(config.folder, verify=True)
    with Progress(transient=True) as bar:
        task = bar.add_task("decoding lesions", total=len(index))
        verify_samples(index, config.workers, lambda done, total: bar.update(task, completed=done))
    missing = int((index.sizes == 0).sum())
    for diagnosis, count in index.counts().items():
        if count:
            print(f"  {diagnosis:<10} {count:>7}")
    print(
        f"{len(index)} lesions in {len(index.shards)} shards are whole: checksums, index, "
        f"{2 * len(index) - missing} photos ({missing} views missing), read alike by webdataset"
    )


if __name__ == "__main__":
    run(VerifyConfig, main, __doc__)
