"""Tokens of frozen towers in the cache: by the backends of CPUs, and in batches that overlap."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from triderm_dist.config import Experiment, load
from triderm_dist.data import token_cache
from triderm_dist.data.token_cache import CHUNK, HEADER, TokenCache
from triderm_dist.data.token_codec import TokenCodec
from triderm_dist.distributed import parallel
from triderm_dist.engine import token_extraction
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.model_inputs import open_inputs
from triderm_dist.engine.model_tower import training_tower
from triderm_dist.models.cpu_tower import TOLERANCE

LESIONS = CHUNK + 10


def extracted(run: Path, tokens: str, *words: str) -> dict[str, np.ndarray]:
    """Compute the tokens of a run into a folder of their own; returns those of every chunk, by file."""
    experiment = load(
        Experiment,
        None,
        [
            f"output={run}",
            f"tokens={run / tokens}",
            "models.net={width: 16, heads: 2}",
            "models.net.tower={source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true}",
            "train={augment: {token_variants: 1}, precision: fp32}",
            *words,
        ],
    )
    index = synthetic_shards(run / "shards", LESIONS, 40)
    accelerator = parallel.start_inference("fp32")
    model = experiment.models["net"]
    tower = training_tower(experiment, model, index)
    open_inputs(experiment, model, index, accelerator, tower, transforms=2)
    files = sorted((run / tokens).rglob("*.tokens"))
    return {str(file.relative_to(run / tokens)): tokens_of(file) for file in files}


def tokens_of(file: Path) -> np.ndarray:
    """Return the tokens (n, 2, L, D) of a chunk in float16."""
    about = json.loads(file.read_bytes()[:HEADER])
    cache = TokenCache(file.parents[1], LESIONS, tuple(about["shape"]), about["dtype"])
    rows = np.arange(about["first"], about["first"] + about["lesions"])
    return cache.numbers_of_all_views(rows, file.parent.name).astype(np.float16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def fast(run: Path) -> dict[str, np.ndarray]:
    return extracted(run, "fast")


def test_cached_tokens_are_those_of_plain_pytorch(
    run: Path, fast: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(token_extraction, "MIN_PHOTOS", 10**9)
    plain = extracted(run, "plain")
    assert "computed by" not in capsys.readouterr().out
    assert list(fast) == list(plain) and len(fast) == 2 * 3  # plain, augmented, one transform
    for name, tokens in plain.items():
        expected = tokens.astype(np.float32)
        largest = np.abs(expected).max()
        rounding = np.spacing(np.abs(tokens)).astype(np.float32)
        assert (np.abs(fast[name] - expected) <= TOLERANCE * largest + rounding).all(), name
        assert len(np.unique(expected.reshape(len(expected), -1), axis=0)) == len(expected)  # photos differ


def test_the_same_backend_gives_the_same_bytes(run: Path, fast: dict[str, np.ndarray]) -> None:
    for path in (run / "fast").rglob("000001.tokens"):  # a resumed run computes what is missing
        path.unlink()
    again = extracted(run, "fast")
    for name, tokens in fast.items():
        assert np.array_equal(again[name], tokens), name


def test_tokens_of_earlier_versions_are_taken_over(run: Path, fast: dict[str, np.ndarray]) -> None:
    """Each chunk from its .npy file, which is then removed, and computed where that is damaged."""
    for name, tokens in fast.items():
        file = run / "earlier" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file.with_suffix(".npy"), tokens + np.float16(1))
    (damaged,) = (run / "earlier").glob("*/plain/000001.npy")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    taken = extracted(run, "earlier")
    assert list(taken) == list(fast) and not list((run / "earlier").rglob("*.npy"))
    for name, tokens in fast.items():
        shift = 0 if name.endswith("plain/000001.tokens") else 1
        assert np.array_equal(taken[name], tokens + np.float16(shift)), name


def test_int8_tokens_take_half_the_space_in_a_cache_of_their_own(run: Path, fast: dict[str, np.ndarray]) -> None:
    tokens = extracted(run, "fast", "models.net.tower.token_dtype=int8")
    assert sorted(fast) == sorted(name for name in tokens if name in fast) and len(tokens) == 2 * len(fast)
    for kind in ("plain", "augmented", "dihedral"):
        (exact,) = (value for name, value in fast.items() if kind in name and name.endswith("000000.tokens"))
        (other,) = (value for name, value in tokens.items() if kind in name and name.endswith("000000.tokens")
                    and name not in fast)  # fmt: skip
        assert 0 < np.abs(other.astype(np.float32) - exact).max() <= np.abs(exact).max() / 250
    sizes = sorted({path.stat().st_size for path in (run / "fast").glob("*/plain/000000.tokens")})
    assert sizes[0] / sizes[1] == pytest.approx(0.53, abs=0.01)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_ranks_share_the_chunks_and_agree_after_each_round(
    ranks: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 chunks of up to 3 parts. A rank that has no chunk left agrees as often as the others do."""
    monkeypatch.setattr(token_cache, "CHUNK", 2)
    monkeypatch.setattr(token_cache, "MAX_CHUNKS", 7)
    calls, cache = [], TokenCache(tmp_path, 41, (4, 8))
    assert len(cache.chunks) == 7 and len(cache.parts(0)) == 3
    written: list[int] = []
    monkeypatch.setattr(token_extraction, "_missing", lambda *_: (missing, set()))
    missing = cache.missing(["plain"])
    for rank in range(ranks):
        accelerator = SimpleNamespace(
            num_processes=ranks, process_index=rank, is_main_process=False, wait_for_everyone=lambda: None
        )
        rows: list[int] = []

        def extract(encoder: object, part: np.ndarray, version: str, codec: TokenCodec, rows=rows) -> np.ndarray:
            rows.extend(part.tolist())
            return np.zeros((len(part), 2, codec.size), np.uint8)

        extractor = token_extraction.TokenExtractor(
            torch.nn.Identity(), None, None, 0, accelerator, ("clinical", "dermoscopic")
        )
        extractor.extract, extractor.encoder = extract, lambda *_: None
        count: list[None] = []
        extractor.fill(cache, ["plain"], False, lambda count=count: count.append(None))
        calls.append(len(count))
        written += rows
    assert sorted(written) == list(range(41)) and cache.missing(["plain"]) == []
    assert calls == [3 * -(-7 // ranks)] * ranks
