"""From hooked layers to one row vector per example: each layer is reduced and sketched as soon as backward reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from llmselect.engine.ekfac import inverse_product
from llmselect.engine.gradients import names_of, outer
from llmselect.kernels.sketch import Fold, rademacher

if TYPE_CHECKING:
    from llmselect.engine.moments import Moments


Curvature = tuple[Mapping[str, torch.Tensor], float]  # EK-FAC factors, and the damping


class Projection:
    """Sketched per-row gradients of `layers`, as the `reduce` and `sink` of `row_gradients`.

    With `k`, the larger side of a weight `[d_out, d_in]` is first multiplied by a Rademacher matrix `[k, d]`, the other
    stays exact. With `dim` the remaining matrix is folded into `dim` columns shared by all layers; without, every layer
    has columns of its own. Nothing of size batch × parameters is held beyond one layer.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Linear], *, k: int | None, dim: int | None, seed: int,
                 device: torch.device):  # fmt: skip
        self.layers, self.device = dict(layers), device
        self.known = dict(zip(layers, names_of(list(layers)), strict=True))
        self.left: dict[str, torch.Tensor] = {}  # R for the output side
        self.right: dict[str, torch.Tensor] = {}  # R for the input side
        self.folds: dict[str, Fold] = {}
        self.place: dict[str, slice] = {}
        at = 0
        for name, layer in self.layers.items():
            rows, columns = layer.weight.shape
            if k is not None and max(rows, columns) > k:
                side, wide = (self.right, columns) if columns >= rows else (self.left, rows)
                side[name] = rademacher(seed, self.known[name], k, wide).to(device)
                rows, columns = (rows, k) if columns >= rows else (k, columns)
            if dim is not None:
                self.folds[name] = Fold.make(seed, self.known[name], rows * columns, dim, device)
            self.place[name] = slice(at, at := at + rows * columns)
        self.width = dim or at
        self.out = torch.zeros(0, self.width)
        self.moments: Moments | None = None
        self.curvature: Curvature | None = None

    def start(self, rows: int, moments: Moments | None = None, curvature: Curvature | None = None) -> None:
        """Begin a batch; with `moments`, gradients become the optimizer's next steps; with `curvature` they are
        multiplied by the inverse Fisher, before anything is projected."""
        self.out = torch.zeros(rows, self.width, device=self.device)
        self.moments, self.curvature = moments, curvature

    def reduce(self, name: str, activation: torch.Tensor) -> torch.Tensor:
        """The input of a layer, projected where the input is its larger side."""
        return activation if self.curvature else self._input(name, activation)

    def _input(self, name: str, columns: torch.Tensor) -> torch.Tensor:
        matrix = self.right.get(name)
        return columns if matrix is None else columns.to(matrix.dtype) @ matrix.T

    def _output(self, name: str, columns: torch.Tensor) -> torch.Tensor:
        matrix = self.left.get(name)
        return columns if matrix is None else columns.to(matrix.dtype) @ matrix.T

    def sink(self, name: str, activation: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a layer's rows to the batch."""
        if self.curvature is not None:
            self.matrices(name, inverse_product(self.curvature[0], name, outer(gradient, activation), self.curvature[1]))
        else:
            self._add(name, outer(self._output(name, gradient), activation))

    def matrices(self, name: str, whole: torch.Tensor) -> None:
        """Add a layer's rows given as whole matrices `[B, d_out, d_in]`."""
        self._add(name, self._output(name, self._input(name, whole).transpose(1, 2)).transpose(1, 2))

    def _add(self, name: str, rows: torch.Tensor) -> None:
        if self.moments is not None:
            rows = self.moments.step(self.known[name], rows)
        rows = rows.flatten(1)
        if name in self.folds:
            self.folds[name].add(self.out, rows)
        else:
            self.out[:, self.place[name]] = rows
