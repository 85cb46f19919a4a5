"""What a run tells: one line a log interval on rank 0, the same as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any


class Tracker:
    """Appends records to FOLDER/metrics.jsonl and TensorBoard events to FOLDER/tensorboard; silent where `active` is
    False.

    Records: {"kind": "train", epoch, step, loss, focal, soft_f1, aux, lr, grad_norm, ...} and {"kind": "validation",
    epoch, step, macro_f1 (argmax), official, ...}. Opening at a step drops later records: a resumed run writes them
    again.
    """

    def __init__(self, folder: Path, active: bool, step: int = 0) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._file.close()
            self._board.close()

    def log(self, kind: str, epoch: float, step: int, values: dict[str, float], line: str) -> None:
        """Record values; `line` is what people read."""
        if not self.active:
            return
        record: dict[str, Any] = {"kind": kind, "epoch": round(epoch, 4), "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        print(line, flush=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def summary(values: dict[str, float]) -> str:
    """The values of a training record for people."""
    return (
        f"loss {values['loss']:.4f} (focal {values['focal']:.4f} soft F1 {values['soft_f1']:.4f} "
        f"aux {values['aux']:.4f})  lr {values['lr']:.2e}  grad {values['grad_norm']:.2f}  "
        f"{values['lesions_per_s']:.0f} lesions/s  data wait {values['data_wait']:.0%}"
    )
