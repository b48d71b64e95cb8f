"""Out of memory shrinks the batch and continues at the same row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmselect.errors import LlmselectError

log = logging.getLogger("llmselect")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device or the host could not give the memory asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


@dataclass
class BackOff:
    """Runs batches, halving those that do not fit; later batches start at the size that did."""

    row_limit: int | None = None

    def run(self, rows: np.ndarray, step: Callable[[np.ndarray], object], ids: Sequence[str]) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield `(rows, step(rows))` over parts of `rows` that fit, in order.

        Errors: `LlmselectError` naming the row when one row alone does not fit.
        """
        todo = [rows]
        while todo:
            part = todo.pop()
            if self.row_limit and len(part) > self.row_limit:
                todo += [part[self.row_limit :], part[: self.row_limit]]
                continue
            try:
                result = step(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise LlmselectError(
                        f"row {ids[int(part[0])]} alone does not fit into memory; lower max_length or use a larger device"
                    ) from error
                result = None
            if result is None:  # outside the handler: the traceback would keep the failed batch's tensors alive
                self.row_limit = len(part) // 2
                log.warning("out of memory at %d rows; going on with batches of %d", len(part), self.row_limit)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                todo.append(part)
            else:
                yield part, result
