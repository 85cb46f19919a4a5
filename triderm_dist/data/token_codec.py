"""How the numbers that a frozen tower returns for a photo are stored: float16, bfloat16, int8 or float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TokenDtype = Literal["float16", "bfloat16", "int8", "float32"]
BLOCK = 32
"""int8: neighboring numbers that share a scale. A channel of large values reduces only its neighbors' precision."""


@dataclass(frozen=True)
class TokenCodec:
    """Turns numbers (..., *shape) into records (..., size) uint8 and back, on any device.

    int8: each `BLOCK` numbers are multiples of a float16 scale, their largest absolute value divided by 127. A record
    then holds all multiples, zeros up to a whole block, and the scales.
    """

    dtype: TokenDtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of a record."""
        numbers = math.prod(self.shape)
        if self.dtype == "int8":
            blocks = -(-numbers // BLOCK)
            return blocks * (BLOCK + 2)
        return numbers * _DTYPES[self.dtype].itemsize

    def encode(self, numbers: Tensor) -> Tensor:
        """Return numbers (..., *shape) as records (..., size) uint8."""
        flat = numbers.flatten(-len(self.shape))
        if self.dtype != "int8":
            return flat.to(_DTYPES[self.dtype]).contiguous().view(torch.uint8)
        values, scales = _quantize(flat)
        return torch.cat([values.flatten(-2).view(torch.uint8), scales.view(torch.uint8)], -1)

    def decode(self, records: Tensor, copy: bool = False) -> Tensor:
        """Return records (B, size) uint8 as numbers (B, *shape) float32, those of maps (C, H, W) with channels last.

        copy: also where float32 records could be viewed.
        """
        layout = torch.channels_last if len(self.shape) == 3 else torch.contiguous_format
        shape, numbers = (len(records), *self.shape), math.prod(self.shape)
        if self.dtype != "int8":
            stored = records.view(_DTYPES[self.dtype]).view(shape)
            return stored.to(torch.float32, memory_format=layout, copy=copy)
        end = -(-numbers // BLOCK) * BLOCK
        values, scales = records[..., :end].view(torch.int8), records[..., end:].view(torch.float16)
        floats = values.unflatten(-1, (-1, BLOCK)) * scales.float().unsqueeze(-1)
        return floats.flatten(-2)[..., :numbers].reshape(shape).contiguous(memory_format=layout)


def as_stored(numbers: Tensor, dtype: TokenDtype, dims: int = 2) -> Tensor:
    """Return numbers, those of a photo in the last `dims` dimensions, as they are read after they were stored: float32.

    The same as encoding and decoding them, by operations that can be exported.
    """
    if dtype != "int8":
        return numbers.to(_DTYPES[dtype]).float()
    flat = numbers.flatten(-dims)
    values, scales = _quantize(flat)
    floats = values * scales.float().unsqueeze(-1)
    return floats.flatten(-2)[..., : flat.shape[-1]].reshape(numbers.shape)


def _quantize(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers (..., N) as multiples (..., blocks, BLOCK) int8 of scales (..., blocks) float16."""
    padded = torch.nn.functional.pad(flat.float(), (0, -flat.shape[-1] % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    scales = (blocks.abs().amax(-1) / 127).half()
    divisor = scales.float().unsqueeze(-1)
    values = (blocks / torch.where(divisor > 0, divisor, 1.0)).round().clamp(-127, 127)
    return values.to(torch.int8), scales


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
