"""Indexing tars of others."""

from __future__ import annotations

from benchmarks.scale_rows import Row

ROWS: tuple[Row, ...] = ()
