"""A value with the ends of its interval."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

MOST_DECIMALS = 6
"""Of a difference, see `Interval.decimals`."""
NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends are on one side of 0: a difference beyond the noise."""
        return self.low > 0 or self.high < 0

    def decimals(self, least: int = 3) -> int:
        """Return with how many decimals a difference is written: `least`, or more, up to `MOST_DECIMALS`, where its
        interval is narrower, or where the end next to 0, which it excludes, would look like 0.
        """
        lengths = [
            (self.high - self.low) / 2,
            *([2 * min(abs(self.low), abs(self.high))] if self.excludes_zero else []),
        ]
        needed = (math.ceil(-math.log10(length)) for length in lengths if length > 0)
        return min(max(least, *needed, 0), MOST_DECIMALS)

    def signed(self) -> tuple[str, str, str]:
        """Return the texts of a difference and of the ends of its interval."""
        spec = f"+.{self.decimals()}f"
        return format(self.value, spec), format(self.low, spec), format(self.high, spec)

    def json(self) -> dict[str, float]:
        return asdict(self)


UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))
