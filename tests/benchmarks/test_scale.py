"""The exponents and the summary of benchmarks.scale."""

from __future__ import annotations

import pytest

from benchmarks.scale import BASE, ROWS, SIZES, exponent, summary_of


def figures(power: float, least: float = 1.0) -> dict[int, dict[str, float]]:
    return {n: {"cpu_s": least * ((n - BASE) / 9_000) ** power, "peak_mb": 0.0, "seconds": 1.0} for n in SIZES}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_is_that_of_the_power_law(power):
    assert exponent(figures(power), "cpu_s") == pytest.approx(power)


def test_small_figures_have_no_exponent():
    assert exponent(figures(1.0), "peak_mb") is None
    assert exponent(figures(1.0, least=1e-6), "cpu_s") is None
    only_the_largest_two = exponent(figures(1.0, least=0.02), "cpu_s")
    assert only_the_largest_two == pytest.approx(1.0)


def test_summary_names_what_was_not_measured():
    summary = summary_of({"start of a rank": figures(1.0)})
    assert summary["start_s_10m"] == pytest.approx(9_999_000 / 9_000, abs=0.01)
    assert summary["ensemble_s_1m"] is None
    assert summary["largest_exponent"] == 1.0


def test_rows_have_names_of_their_own():
    from benchmarks import scale

    modules = (scale.pack, scale.urls, scale.start, scale.tokens, scale.tables, scale.ensemble)
    assert len(ROWS) == sum(len(module.ROWS) for module in modules)
