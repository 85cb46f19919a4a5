"""The token cache: where numbers are stored, what is read of them, and how many files are open."""

from __future__ import annotations

import io
import os
import resource
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from triderm_dist.data import token_cache
from triderm_dist.data.token_cache import JoinedCache, TokenCache
from triderm_dist.data.token_codec import TokenCodec, as_stored
from triderm_dist.schema import DataError

SHAPE = (3, 5)
RELATIVE_ERROR = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
"""Of one number."""


def numbers_of(lesions: int, seed: int = 0) -> np.ndarray:
    """Return numbers (lesions, 2, *SHAPE) that float16 holds exactly."""
    return np.random.default_rng(seed).standard_normal((lesions, 2, *SHAPE)).astype(np.float16)


def filled(cache: TokenCache, versions: dict[str, np.ndarray]) -> TokenCache:
    for version, numbers in versions.items():
        for chunk in cache.chunks:
            parts = [cache.codec.encode(torch.from_numpy(numbers[rows])).numpy() for rows in cache.parts(chunk)]
            cache.write_parts(version, chunk, parts)
    return cache


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few lesions: parts of 2, at most 5 files of a version."""
    monkeypatch.setattr(token_cache, "CHUNK", 2)
    monkeypatch.setattr(token_cache, "MAX_CHUNKS", 5)


@pytest.mark.parametrize("lesions", [1, 256, 5_240, 131_072, 131_073, 10_000_000])
def test_chunks_cover_every_lesion_once_in_few_files(tmp_path, lesions):
    cache = TokenCache(tmp_path, lesions, (1, 1))
    ends = [(int(rows[0]), int(rows[-1]) + 1) for rows in map(cache.rows, cache.chunks)]
    assert [end for _, end in ends[:-1]] == [start for start, _ in ends[1:]]
    assert ends[0][0] == 0 and ends[-1][1] == lesions and len(ends) <= 512
    assert len({end - start for start, end in ends[:-1]} | {cache.chunk_lesions}) == 1
    for chunk in (0, len(ends) - 1):
        assert np.array_equal(np.concatenate(cache.parts(chunk)), cache.rows(chunk))
        assert all(len(rows) == 256 for rows in cache.parts(chunk)[:-1])
    if lesions <= 131_072:
        assert cache.chunk_lesions == 256  # as in earlier versions


def test_each_row_is_read_in_its_version(tmp_path, small_chunks):
    versions = {"plain": numbers_of(23), "augmented-0": numbers_of(23, 1)}
    cache = filled(TokenCache(tmp_path, 23, SHAPE), versions)
    assert cache.chunk_lesions == 6 and len(cache.chunks) == 4 and cache.missing(versions) == []
    generator = np.random.default_rng(0)
    rows, chosen = generator.integers(23, size=50), generator.choice(list(versions), 50).tolist()
    for view in range(2):
        records = np.empty((50, cache.record_size), np.uint8)
        cache.read(rows, view, chosen, records)
        expected = [versions[version][row, view] for row, version in zip(rows, chosen, strict=True)]
        assert np.array_equal(cache.decode(torch.from_numpy(records)).numpy(), expected)
    assert np.array_equal(cache.numbers_of_all_views(np.arange(7, 11), "plain"), versions["plain"][7:11])


def test_few_files_are_open_whatever_their_number(tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(token_cache, "MAX_CHUNKS", 40)
    monkeypatch.setattr(token_cache, "open_files_limit", lambda: 16)
    numbers = numbers_of(80)
    cache = filled(TokenCache(tmp_path, 80, SHAPE), {"plain": numbers})
    assert len(list((tmp_path / "plain").iterdir())) == 40
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert np.array_equal(cache.numbers(np.arange(80), 1, "plain"), numbers[:, 1])
        assert len(os.listdir("/proc/self/fd")) == before + 4


def test_fewer_files_stay_open_where_the_process_has_no_more_descriptors(tmp_path, small_chunks, monkeypatch):
    """As where a run reads many caches, each of which may keep a quarter of the files open."""
    monkeypatch.setattr(token_cache, "MAX_CHUNKS", 40)
    numbers = numbers_of(80)
    cache = filled(TokenCache(tmp_path, 80, SHAPE), {"plain": numbers})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = min(set(range(1000)) - {int(number) for number in os.listdir("/proc/self/fd")})
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 6, limits[1]))
        found = [cache.numbers(np.arange(80), 1, "plain") for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert np.array_equal(found, [numbers[:, 1]] * 2)


def test_missing_chunks_are_listed_without_looking_at_each(tmp_path, small_chunks):
    cache = filled(TokenCache(tmp_path, 23, SHAPE), {"plain": numbers_of(23)})
    (tmp_path / "plain" / "000002.tokens").unlink()
    assert cache.missing(["plain", "other"]) == [("plain", 2), *(("other", chunk) for chunk in range(4))]


def test_damage_is_found_in_the_record_that_is_read(tmp_path):
    numbers = numbers_of(4)
    filled(TokenCache(tmp_path, 4, SHAPE), {"plain": numbers})
    path = tmp_path / "plain" / "000000.tokens"
    data = path.read_bytes()
    size = (len(data) - token_cache.HEADER) // 8
    swapped = bytearray(data)  # two records with their checksums
    for to, start in ((2, 3), (3, 2)):
        at, source = (token_cache.HEADER + number * size for number in (to, start))
        swapped[at : at + size] = data[source : source + size]
    flipped = bytearray(data)
    flipped[token_cache.HEADER + 3 * size - 6] ^= 1
    for damaged, views in ((flipped, [0]), (swapped, [0, 1]), (data[:-1], [0, 1]), (data + b"0", [0, 1])):
        path.write_bytes(damaged)
        for view in views:
            with pytest.raises(DataError, match=f"^{path}: changed or damaged; delete it, and the next run computes"):
                TokenCache(tmp_path, 4, SHAPE).numbers(np.array([1]), view, "plain")
    path.write_bytes(flipped)
    assert np.array_equal(TokenCache(tmp_path, 4, SHAPE).numbers(np.array([0, 2]), 1, "plain"), numbers[[0, 2], 1])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}/plain/000000.tokens: no such file; the same command computes"):
        TokenCache(tmp_path, 4, SHAPE).numbers(np.arange(1), 0, "plain")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numbers_of_earlier_versions_are_read_unless_damaged(tmp_path, small_chunks, dtype):
    cache, numbers = TokenCache(tmp_path, 11, SHAPE, dtype), numbers_of(11).astype(dtype)
    rows = cache.parts(1)[1]
    assert rows.tolist() == [6, 7] and cache.earlier("plain", rows) is None
    content = io.BytesIO()
    np.save(content, numbers[rows])
    data = content.getvalue()
    checked = data + b"CRC32" + zlib.crc32(data).to_bytes(4, "little")
    path = tmp_path / "plain" / "000003.npy"
    path.parent.mkdir()
    for intact in (data, checked):
        path.write_bytes(intact)
        assert np.array_equal(cache.earlier("plain", rows), numbers[rows])
    assert TokenCache(tmp_path, 11, (3, 4), dtype).earlier("plain", rows) is None
    assert TokenCache(tmp_path, 11, SHAPE, "bfloat16").earlier("plain", rows) is None
    for damaged in (b"", data[:-1], checked[:-30] + b"\1" + checked[-29:], checked[:-1]):
        path.write_bytes(damaged)
        assert cache.earlier("plain", rows) is None
    cache.remove_earlier("plain", 0)
    assert path.exists()
    cache.remove_earlier("plain", 1)
    assert not path.exists()


def test_joined_caches_are_read_side_by_side(tmp_path):
    caches, parts = [], []
    for number, width in enumerate((2, 5)):
        values = np.random.default_rng(number).standard_normal((4, 2, 1, width)).astype(np.float32)
        cache = TokenCache(tmp_path / str(number), 4, (1, width), "float32")
        cache.write("plain", 0, values)
        caches.append(cache)
        parts.append(values)
    joined, expected, rows = JoinedCache(caches), np.concatenate(parts, 3), np.array([3, 0, 3])
    records = np.empty((3, joined.record_size), np.uint8)
    joined.read(rows, 1, ["plain"] * 3, records)
    assert np.array_equal(joined.decode(torch.from_numpy(records)).numpy(), expected[rows, 1])
    assert np.array_equal(joined.numbers(rows, 1, "plain"), expected[rows, 1])


@pytest.mark.parametrize("shape", [(7, 33), (1, 64), (4, 3, 5)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "float32"])
def test_stored_numbers_are_near_the_given_ones(dtype, shape):
    numbers = torch.randn((6, *shape), generator=torch.Generator().manual_seed(0))
    numbers[:, 0] *= 1000  # a token, or a channel, of large numbers
    numbers[0] = 0
    codec = TokenCodec(dtype, shape)
    records = codec.encode(numbers)
    assert records.shape == (6, codec.size) and records.dtype == torch.uint8
    decoded = codec.decode(records)
    assert decoded.is_contiguous(memory_format=torch.channels_last if len(shape) == 3 else torch.contiguous_format)
    assert torch.equal(decoded, as_stored(numbers, dtype, len(shape)))
    assert torch.equal(codec.decode(codec.encode(decoded)), decoded)  # storing again changes nothing
    if dtype == "int8":
        flat = torch.nn.functional.pad(numbers.flatten(1), (0, -numbers[0].numel() % 32)).unflatten(1, (-1, 32))
        allowed = flat.abs().amax(2, keepdim=True).expand_as(flat).flatten(1)[:, : numbers[0].numel()] / 253
    else:
        allowed = numbers.flatten(1).abs() * RELATIVE_ERROR[dtype]
    assert ((decoded - numbers).flatten(1).abs() <= allowed + 1e-7).all()


def test_float32_numbers_are_copied_where_asked():
    codec = TokenCodec("float32", (2, 3))
    records = codec.encode(torch.ones(2, 2, 3))
    shared, copied = codec.decode(records), codec.decode(records, copy=True)
    records.zero_()
    assert not shared.any() and copied.all()


def test_chunks_have_the_mode_of_patient_data(tmp_path: Path):
    filled(TokenCache(tmp_path, 4, SHAPE), {"plain": numbers_of(4)})
    assert (tmp_path / "plain" / "000000.tokens").stat().st_mode & 0o007 == 0
