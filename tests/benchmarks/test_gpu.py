"""The results, the profile and the tables of benchmarks.gpu; what is measured needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import GpuBenchmark, Results, cells_of, profile_lines
from benchmarks.gpu_cells import profile_of
from benchmarks.gpu_tables import GpuTables, main

FACTS = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "peak_tflops": 989}
STEP = {"model": "base", "lesions": 96, "mode": "compiled-graph", "lesions_per_s": 2600.0, "step_ms": 36.9}
STEP |= {"host_cpu_ms": 1.0, "peak_gib": 11.0, **FACTS}


def event(kind: str, name: str, start: float, microseconds: float) -> dict[str, object]:
    return {"cat": kind, "name": name, "ts": start, "dur": microseconds}


@pytest.fixture
def profile() -> dict[str, object]:
    return profile_of(
        [
            event("kernel", "sm90_xmma_gemm_bf16", 1000, 600),
            event("kernel", "sm90_xmma_gemm_bf16", 1700, 300),
            event("kernel", "triton_poi_fused_add_0", 1500, 200),  # overlaps the first one by 100
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 2100, 100),
            event("cuda_runtime", "cudaGraphLaunch", 900, 50),
            event("gpu_user_annotation", "Optimizer.step", 1000, 1200),
            {"ph": "M", "name": "process_name"},
        ]
    )


def test_profile_counts_overlapping_kernels_once_and_groups_by_kind(profile):
    assert (profile["kernels"], profile["copies"], profile["host_calls"]) == (3, 1, 1)
    assert (profile["device_ms"], profile["device_span_ms"]) == (1.1, 1.2)
    assert profile["kinds"] == {
        "matrix products": [0.9, 2], "compiled element-wise": [0.2, 1], "copies and casts": [0.1, 1]
    }  # fmt: skip
    assert profile["top"][0] == ["sm90_xmma_gemm_bf16", 2, 0.9]


def test_profile_without_device_events_has_no_times():
    assert profile_of([event("cuda_runtime", "cudaLaunchKernel", 0, 1)]) == {"host_calls": 1}


def test_profile_is_printed_by_kind_and_kernel(profile):
    lines = [*profile_lines("base-96-graph", {**STEP, **profile})]
    assert "3 kernels, 1 copies, 1 calls" in lines[0]
    assert "75.0%" in lines[1] and lines[1].endswith("matrix products")
    assert lines[-1].endswith("Memcpy HtoD (Pinned -> Device)")


def results(folder: Path) -> Results:
    return Results(GpuBenchmark(output=str(folder), commit="abc"))


def test_finished_cells_are_kept_and_failed_ones_are_repeated(tmp_path, capsys):
    first = results(tmp_path)
    first.add(1, "flops-base", {"gflop": 170.0})
    first.add(1, "base-96-compiled-graph", dict(STEP))
    first.add(1, "base-96-eager", {"error": "the time was over"})
    second = results(tmp_path)
    assert [second.is_done(name) for name in ("base-96-compiled-graph", "base-96-eager", "other")] == [
        True,
        False,
        False,
    ]
    assert second.cells["base-96-compiled-graph"]["mfu"] == pytest.approx(2600 * 170e9 / 989e12, abs=1e-4)


def test_every_cell_has_a_name_of_its_own_and_the_first_ones_come_first():
    cells = cells_of(GpuBenchmark())
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.part for cell in cells} == {1, 2, 3, 4}
    assert [cell.name for cell in cells if cell.rank][:2] == ["base-96-compiled-graph", "base-96-eager"]


def test_tables_replace_what_stands_between_the_marks(tmp_path, capsys):
    found = results(tmp_path)
    found.add(1, "flops-base", {"gflop": 170.0})
    found.add(1, "base-96-compiled-graph", dict(STEP))
    found.add(2, "ours-compiled", {**STEP, "model": "sketch"})
    found.add(2, "sketch-bf16", {"lesions_per_s": 1300.0, "step_ms": 73.8, "peak_gib": 11.0, "lesions": 96, **FACTS})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu tables -->\nold\n<!-- end of gpu tables -->\nafter\n")
    for _ in range(2):
        main(GpuTables(results=str(tmp_path), page=str(page)))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| base | 96 | compiled, graph | 2,600 | 44.7% | 36.9 |" in text
    assert "| the guide's sketch, bf16 | 1,300 |  | 73.8 |  | 11.0 | 2.00 |" in text
    assert max(map(len, text.splitlines())) <= 120
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["mfu_base"], last["vs_sketch_bf16"], last["mfu_large"]) == (0.4469, 2.0, None)


def test_tables_of_photos_memory_and_folds_hold_short_lines(tmp_path, capsys):
    found = results(tmp_path)
    step = {"experiment": "rtx4090_large", "model": "trimodal", "micro_batch": 96, "accumulation": 1}
    found.add(
        2, "memory-rtx4090_large-trimodal", {**step, "precision": "bf16", "checkpointing": True, "peak_gib": 10.0}
    )
    found.add(2, "estimate-rtx4090_large-trimodal", {"estimate_gib": 10.3})
    found.add(2, "out-of-memory", {"exit": 0, "micro_batch_kept": 48, **FACTS})
    loader = {"model": "dual_cnn", "side": 384, "workers": 8, "packed_side": 450, "photos_per_s": 9000}
    found.add(3, "loader-dual_cnn-8", {**loader, "photos_per_cpu_s": 1500, **FACTS})
    found.add(3, "two-base", {"model": "base", "lesions": 96, "workers": 6, "lesions_per_s": 2100.0, **FACTS})
    found.add(3, "predict", {"lesions_per_s": 210.0, **FACTS})
    scores = {"lesions": 4717, "epochs": 25, "seconds": 90.0, "lesions_per_s": 1800.0, "data_wait": 0.01}
    found.add(4, "fold-dual_cnn", {"model": "dual_cnn", **scores, "macro_f1": 0.5, "official": 0.51, **FACTS})
    found.add(4, "xgboost-5000x60", {"rows": 5000, "columns": 60, "threads": 16, "cpu_s": 0.5, "cuda_s": 0.9, **FACTS})
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu tables -->\n<!-- end of gpu tables -->\n")
    main(GpuTables(results=str(tmp_path), page=str(page)))
    text = page.read_text()
    assert "| 10.30 | 10.00 | 3.0% |" in text and "went on with 48" in text
    assert "| dual CNN | 384 | 8 | 9,000 | 1,500 |" in text and "| base | 2 | 96 | 6 | 2,100 |  |" in text
    assert "| dual CNN | 4,717 | 25 | 90 |" in text and "| 5,000 | 60 | 0.50 | 0.90 |" in text
    assert max(map(len, text.splitlines())) <= 120
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["memory_worst_error"] == 0.03
