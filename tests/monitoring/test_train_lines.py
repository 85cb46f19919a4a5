"""The rows of a training, in 80 columns."""

import pytest

from triderm_dist.monitoring.train_lines import ROWS, TrainLines

PARTS = ("focal", "soft_f1", "aux")
VALUES = {
    "loss": 2.41153, "focal": 2.0965, "soft_f1": 0.9088, "aux": 3.0631, "lr": 9.57e-4, "grad_norm": 1.504,
    "lesions_per_s": 135.2, "data_wait": 0.012, "memory_gib": 0.92, "mfu": 0.416,
}  # fmt: skip
LARGE = {name: value * 10_000 for name, value in VALUES.items()} | {"data_wait": 1, "mfu": 0.99, "lr": 1e-4}


def test_row_and_its_header():
    header, row = TrainLines(176, 16, PARTS).train(10, VALUES, 3725.4).splitlines()
    assert header == "   step   loss focal soft_f1   aux      lr  grad les/s wait  GiB     left"
    assert row == " 10/176 2.4115 2.096   0.909 3.063 9.6e-04  1.50 135.2   1%  0.9  1:02:05"


@pytest.mark.parametrize("values", [VALUES, LARGE])
@pytest.mark.parametrize("total", [9, 2_640, 264_000, 26_400_000])
@pytest.mark.parametrize("parts", [PARTS, (*PARTS, "another_term")])
@pytest.mark.parametrize("prefix", ["", "trimodal fold 0 ", "trimodal_dermlip fold 12 "])
def test_lines_fit_80_columns_and_rows_their_header(values, total, parts, prefix):
    lines = TrainLines(total, 100, parts, mfu=True, prefix=prefix)
    header, row = lines.train(total, {**values, "another_term": 1.0}, 359_999.0).splitlines()
    assert len(header) == len(row) <= 80
    assert len(header.removeprefix(prefix).split()) == len(row.removeprefix(prefix).split())
    assert {"step", "loss", "les/s", "MFU", "GiB", "left"} <= set(header.split())
    validation = lines.validation(100, {"macro_f1": 0.25, "official": 0.5})
    assert validation.startswith(f"{prefix}epoch 100/100  macro F1 0.250 (argmax)") and len(validation) <= 80


def test_header_is_repeated():
    lines = TrainLines(176, 16, PARTS)
    rows = [lines.train(step, VALUES, 0).count("\n") for step in range(2 * ROWS + 1)]
    assert [number for number, headers in enumerate(rows) if headers] == [0, ROWS, 2 * ROWS]
