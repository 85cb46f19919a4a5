"""The methods that `benchmarks.loader` compares with, one per process.

python benchmarks/loader_rivals.py METHOD FOLDER BATCH WORKERS [write SOURCE]

`write` makes the method's own files in FOLDER from a challenge folder; without it one epoch is read and the last line
is photos per second, counted from the first batch to the last, so that starting processes and imports do not count. It
imports nothing of the toolkit, so that it also runs in a separate environment.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZE = 224


def pairs(source: Path) -> list[tuple[Path, Path]]:
    """Return the (clinical, dermoscopic) photo of each lesion of a challenge folder."""
    (metadata,) = source.glob("*_Metadata.csv")
    photos = metadata.with_name(metadata.name.replace("_Metadata.csv", "_Input"))
    found: dict[str, dict[str, Path]] = {}
    with metadata.open(encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            path = photos / row["lesion_id"] / f"{row['isic_id']}.jpg"
            found.setdefault(row["lesion_id"], {})["dermoscopic" if "dermo" in row["image_type"] else "clinical"] = path
    return [(views["clinical"], views["dermoscopic"]) for views in found.values() if len(views) == 2]


# --- a folder of photos, as a user would read it ---------------------------------------------------------------------


class Folder(torch.utils.data.Dataset):
    def __init__(self, source: Path, min_lesions: int) -> None:
        from torchvision.transforms import v2

        self.pairs = pairs(source)
        self.pairs *= -(-min_lesions // len(self.pairs))  # the original-size set is small: several epochs in one
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomResizedCrop(SIZE, scale=(0.7, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        clinical, dermoscopic = (self.transform(Image.open(path).convert("RGB")) for path in self.pairs[item])
        return clinical, dermoscopic


def folder(source: Path, batch: int, workers: int) -> Iterable[Any]:
    return torch.utils.data.DataLoader(Folder(source, 1500), batch, shuffle=True, num_workers=workers)


# --- webdataset ------------------------------------------------------------------------------------------------------


def _webdataset(source: Path, batch: int, workers: int, decode: Callable[[Any], Any]) -> Iterable[Any]:
    import webdataset as wds

    shards = [str(path) for path in sorted(source.glob("*.tar"))]
    samples = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(500)
    samples = decode(samples).to_tuple("clinical.jpg", "dermoscopic.jpg", "json").batched(batch)
    return wds.WebLoader(samples, batch_size=None, num_workers=workers)


def webdataset(source: Path, batch: int, workers: int) -> Iterable[Any]:
    return _webdataset(source, batch, workers, lambda samples: samples.decode("rgb8"))


def webdataset_simplejpeg(source: Path, batch: int, workers: int) -> Iterable[Any]:
    """Read as `webdataset` does, with simplejpeg instead of Pillow."""
    return _webdataset(source, batch, workers, lambda samples: samples.decode(_simplejpeg))


def _simplejpeg(key: str, data: bytes) -> Any:
    import simplejpeg

    return simplejpeg.decode_jpeg(data, "RGB") if key.endswith(".jpg") else None


# --- litData ---------------------------------------------------------------------------------------------------------


def _litdata_sample(pair: tuple[Path, Path]) -> dict[str, Any]:
    from PIL import Image

    return {"clinical": Image.open(pair[0]), "dermoscopic": Image.open(pair[1])}


def write_litdata(output: Path, source: Path) -> None:
    import litdata

    litdata.optimize(_litdata_sample, pairs(source), str(output), chunk_bytes="32MB", num_workers=2)


def litdata(source: Path, batch: int, workers: int) -> Iterable[Any]:
    import litdata

    samples = litdata.StreamingDataset(str(source), shuffle=True)
    return litdata.StreamingDataLoader(samples, batch_size=batch, num_workers=workers)


# --- mosaicml-streaming ----------------------------------------------------------------------------------------------


def write_streaming(output: Path, source: Path) -> None:
    from PIL import Image
    from streaming import MDSWriter

    with MDSWriter(out=str(output), columns={"clinical": "jpeg", "dermoscopic": "jpeg"}, size_limit=1 << 25) as writer:
        for clinical, dermoscopic in pairs(source):
            writer.write({"clinical": Image.open(clinical), "dermoscopic": Image.open(dermoscopic)})


def streaming(source: Path, batch: int, workers: int) -> Iterable[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Arrays(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return {name: np.array(image) for name, image in super().__getitem__(at).items()}

    clean_stale_shared_memory()
    samples = Arrays(local=str(source), shuffle=True, batch_size=batch)
    return torch.utils.data.DataLoader(samples, batch, num_workers=workers)


def photos_per_second(batches: Iterable[Any]) -> float:
    def first_view(batch: Any) -> Any:
        return batch["clinical"] if isinstance(batch, dict) else batch[0]

    iterator: Iterator[Any] = iter(batches)
    next(iterator)
    started, photos = time.perf_counter(), 0
    for batch in iterator:
        photos += 2 * len(first_view(batch))
    return photos / (time.perf_counter() - started)


READ = {
    "folder": folder,
    "webdataset": webdataset,
    "webdataset_simplejpeg": webdataset_simplejpeg,
    "litdata": litdata,
    "streaming": streaming,
}
WRITE = {"litdata": write_litdata, "streaming": write_streaming}


def main(method: str, folder: str, batch: str, workers: str, write: str = "", source: str = "") -> None:
    torch.set_num_threads(1)
    if write:
        WRITE[method](Path(folder), Path(source))
    else:
        print(photos_per_second(READ[method](Path(folder), int(batch), int(workers))))


if __name__ == "__main__":
    main(*sys.argv[1:])
