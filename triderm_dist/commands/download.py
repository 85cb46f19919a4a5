"""Download, check and unpack the official files of MILK10k; after an interruption the same command resumes.

triderm download output=MILK10k

About 345 MB. The photos are CC BY-NC 4.0. The exit code is also 3 if the server cannot be
reached.
"""

import shlex
from pathlib import Path
from typing import Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import MAX_SECONDS
from triderm_dist.settings import PathText, Section


class DownloadConfig(Section):
    output: PathText = Field(description="folder for the tables and photos")
    part: Literal["all", "train", "test"] = Field("all", description="training files, test files, or both")
    base_url: str = Field(
        "https://isic-archive.s3.amazonaws.com/challenges/milk10k",
        description="http(s) URL of the files or of a mirror",
    )
    checksums: PathText | None = Field(
        None,
        description="file of expected SHA-256 sums, as written by sha256sum; null checks the length, the MD5 where S3 "
        "gives it, and the checksums inside the zips",
    )
    max_gb: float = Field(20.0, gt=0, description="largest allowed size of an unpacked archive in GB")
    keep_zip: bool = Field(False, description="keep an archive after unpacking it")
    attempts: int = Field(5, ge=1, description="failed attempts in a row without a new byte before giving up")
    timeout: float = Field(30.0, gt=0, le=MAX_SECONDS, description="seconds without a byte that end an attempt")


def main(config: DownloadConfig) -> None:
    from triderm_dist.data.download import FILES, download, read_checksums
    from triderm_dist.data.shards.console import progress_bar

    parts = list(FILES) if config.part == "all" else [config.part]
    folder = Path(config.output)
    download(
        folder,
        [name for part in parts for name in FILES[part]],
        base_url=config.base_url,
        checksums=read_checksums(Path(config.checksums)) if config.checksums else None,
        max_bytes=int(config.max_gb * 10**9),
        keep_zip=config.keep_zip,
        log=print,
        progress=progress_bar,
        attempts=config.attempts,
        timeout=config.timeout,
    )
    for part in parts:
        words = ["triderm", "pack", f"source={folder / FILES[part][0]}", f"output=runs/milk10k/shards/{part}"]
        print(f"next: {shlex.join(words)}")


def start() -> None:
    run(DownloadConfig, main, __doc__)


if __name__ == "__main__":
    start()
