"""The Trainer callback that advances the epoch, records losses, and is saved with checkpoints."""

from __future__ import annotations

# accelerate has no types.
# pyright: reportMissingTypeStubs=false
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llmselect.dynamic.state import EpochState

if TYPE_CHECKING:
    from torch import Tensor


class EpochCallback(TrainerCallback, ExportableState):
    """Keeps an `EpochState` in step with a Trainer.

    It draws the rows of an epoch when the epoch begins, gathers the losses given to `record` from all processes after
    every optimizer step, and lets the learning rate follow the planned steps: when an epoch had fewer steps than planned,
    because rows were left out, the next one starts where the plan has it. Its state is part of `trainer_state.json`.

    Attributes: `history`, for every epoch begun since training started or was resumed its (indices, weights); `steps`,
    the optimizer steps of the current epoch; `first_step`, the global step at which it began.
    """

    next: int
    first_step: int
    steps: int
    resumed: bool

    def __init__(self, epochs: EpochState | None = None):
        # Trainer makes a callback without arguments when it restores callbacks; attach() puts this one back.
        self.epochs = epochs
        self.planned: list[int] = []
        self.rows_per_step = 0
        self.reset()

    def reset(self) -> None:
        """Back to before the first epoch."""
        if self.epochs is not None:
            self.epochs.reset()
        self.next, self.first_step, self.steps, self.resumed = 0, 0, 0, False
        self.pending: list[Tensor] = []
        self.history: list[tuple[Any, Any]] = []

    def record(self, rows: Tensor, losses: Tensor) -> None:
        """Note this process's `rows [B]` and their `losses [B]` (NaN: none); shared with the others after the step."""
        import torch

        # Row numbers as float64: exact, and one gather carries both.
        self.pending.append(torch.stack([rows.double(), losses.detach().double()]))

    def flush(self) -> None:
        """Take the noted losses of all processes into the state; every process must call it."""
        import accelerate.utils
        import torch

        untyped: Any = accelerate.utils
        if self.pending and self.epochs is not None:
            shared: Any = untyped.gather(torch.cat(self.pending, dim=1).T.contiguous())
            rows, losses = shared.T.cpu().numpy()
            self.epochs.record(rows, losses)
        self.pending = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the rows of the epoch."""
        assert self.epochs is not None
        self.epochs.begin(self.next)
        if not self.resumed:
            self.first_step = state.global_step
        self.resumed = False
        self.history.append((self.epochs.indices, self.epochs.weights))
        scheduler: Any = kwargs.get("lr_scheduler")
        if self.planned and hasattr(scheduler, "lr_lambdas"):
            while scheduler.last_epoch < self.planned[self.next]:
                scheduler.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Share the losses of the step."""
        self.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the next epoch the one to begin."""
        self.flush()
        self.next += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        assert self.epochs is not None
        here = {"first_step": self.first_step, "steps": self.steps, "rows_per_step": self.rows_per_step}
        return {"args": {}, "attributes": {"saved": {**here, **self.epochs.saved()}}}
