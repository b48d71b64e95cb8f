"""Random projections of gradients: a one-sided Rademacher matrix and the fold sketch, seeded by name.

Paper: signs and buckets as in the count sketch of Charikar, Chen and Farach-Colton, ICALP 2002; here the buckets of a
    run of `dim` coordinates are a rotation, so that adding is contiguous and coordinates of one run never collide.

All draws come from a counter-based generator keyed by (seed, layer, role) on the CPU: features made on any device, in any
shard and in any process have the same coordinates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def generator(seed: int, layer: str, role: str) -> np.random.Generator:
    """The random source of one use in one layer."""
    digest = hashlib.blake2b(f"{seed}/{layer}/{role}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def random_signs(source: np.random.Generator, count: int) -> np.ndarray:
    """`[count]` int8 of ±1, from raw bits: NumPy promises those of a bit generator across releases, not its distributions."""
    words = np.asarray(source.bit_generator.random_raw(-(-count // 64)), "<u8")
    return 2 * np.unpackbits(words.view(np.uint8), count=count).astype(np.int8) - 1


def rademacher(seed: int, layer: str, rows: int, columns: int) -> torch.Tensor:
    """`[rows, columns]` fp32 of ±1/√rows: E⟨Rx, Ry⟩ = ⟨x, y⟩."""
    import torch

    signs = random_signs(generator(seed, layer, "project"), rows * columns).reshape(rows, columns)
    return torch.as_tensor(signs.astype(np.float32) / np.float32(np.sqrt(rows)))


@dataclass(frozen=True, eq=False)
class Fold:
    """The fold sketch of vectors of `size` coordinates in `dim`: signs `[size]`, one rotation per run of `dim`."""

    signs: torch.Tensor
    shifts: tuple[int, ...]
    dim: int

    @classmethod
    def make(cls, seed: int, layer: str, size: int, dim: int, device: torch.device | str = "cpu") -> Fold:
        """The sketch of one layer. A rotation is drawn also where the layer is smaller than `dim`: otherwise all small
        layers would share the first columns."""
        import torch

        draw = generator(seed, layer, "fold")
        signs = torch.as_tensor(random_signs(draw, size).astype(np.float32)).to(device)
        turns = np.asarray(draw.bit_generator.random_raw(-(-size // dim)), np.uint64)
        return cls(signs, tuple(int(word) for word in turns % np.uint64(dim)), dim)

    def add(self, out: torch.Tensor, vectors: torch.Tensor) -> None:
        """out `[B, dim]` += sketch of `vectors [B, size]`, in place.

        Linear, and unbiased: E⟨Sx, Sy⟩ = ⟨x, y⟩ with variance ≤ (‖x‖²‖y‖² + ⟨x, y⟩²) / dim.
        """
        for run, shift in enumerate(self.shifts):
            at = slice(run * self.dim, min(len(self.signs), (run + 1) * self.dim))
            part = vectors[:, at] * self.signs[at]
            first = min(self.dim - shift, part.shape[1])
            out[:, shift : shift + first] += part[:, :first]
            out[:, : part.shape[1] - first] += part[:, first:]
