"""A tower of three layers, with which an export takes seconds."""

from __future__ import annotations

from torch import Tensor, nn

from triderm_dist.models.towers import Tower, TowerOptions, TowerSource

SIZE = 32


class _Patches(nn.Module):
    """Embed patches of 16 x 16 pixels, (B, 3, H, W) to (B, L, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).flatten(2).transpose(1, 2)


def build(name: str, options: TowerOptions) -> Tower:
    return Tower(
        _Patches(8),
        [nn.Linear(8, 8)],
        nn.LayerNorm(8),
        width=8,
        num_tokens=(SIZE // 16) ** 2,
        image_size=SIZE,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        architecture="small",
        report="small: randomly initialized",
    )


SMALL_TOWER = TowerSource("small:", build)
"""For `TOWER_SOURCES["small"]`."""
