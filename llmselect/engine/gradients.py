"""Per-row gradients of a whole batch from one forward and one backward pass.

Hooks on linear layers see, for every token t, the input a_t and the gradient g_t at the output; the gradient of a row's
loss with respect to the weight is Σ_t g_t a_tᵀ over its tokens. All parameters are frozen and the graph starts at the
lowest hooked block, so no weight gradient of the batch is ever computed: that saves a third of a training step. The LM
head sees response positions only, in chunks.
"""

from __future__ import annotations

# torch has types in part.
# pyright: reportUnknownMemberType=false
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmselect.engine.backbone import unpack
from llmselect.engine.head import CHUNK_LOGITS, check_head, logits
from llmselect.errors import LlmselectError, UsageError

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

# (layer, a [B, T, d_in], g [B, T, d_out]); each is called once per layer and batch, and keeps what it needs.
Sink = Callable[[str, torch.Tensor, torch.Tensor], None]
Reduce = Callable[[str, torch.Tensor], torch.Tensor]


def choose(backbone: Backbone, pattern: str, last_blocks: int | None = None) -> dict[str, torch.nn.Linear]:
    """The linear layers of the decoder blocks whose name matches `pattern` (a regular expression, searched).

    Errors: `UsageError` when none matches, or one matches that is no `nn.Linear` although it has a weight matrix;
    `LlmselectError` for fused experts, and for weights that are tied or shared.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"layers_like: {pattern!r} is no regular expression: {error}") from error
    blocks = list(backbone.blocks)[-last_blocks if last_blocks else 0 :]
    names = {id(module): name for name, module in backbone.causal_lm.named_modules()}
    found: dict[str, torch.nn.Linear] = {}
    for module in (m for block in blocks for m in block.modules()):
        name = names[id(module)]
        own = dict(module.named_parameters(recurse=False))
        if not own or not wanted.search(name):
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = module
        elif any(p.ndim == 3 for p in own.values()):
            raise LlmselectError(
                f"layers_like: {name} holds fused experts ({type(module).__name__}), whose rows' gradients linear hooks do not "
                "see; leave them out, e.g. layers_like: 'q_proj|k_proj|v_proj|o_proj'"
            )
        elif any(p.ndim == 2 for p in own.values()):
            raise UsageError(f"layers_like: {name} is a {type(module).__name__}, no nn.Linear; leave it out of {pattern!r}")
    if not found:
        raise UsageError(f"layers_like: no linear layer of the {len(blocks)} blocks matches {pattern!r}")
    _refuse_shared(backbone, found)
    return found


def _refuse_shared(backbone: Backbone, layers: dict[str, torch.nn.Linear]) -> None:
    users: dict[int, list[str]] = {}
    for name, parameter in backbone.causal_lm.named_parameters(remove_duplicate=False):
        users.setdefault(parameter.data_ptr(), []).append(name)
    for name, layer in layers.items():
        if len(shared := users.get(layer.weight.data_ptr(), [])) > 1:
            raise LlmselectError(f"layers_like: the weight of {name} is shared with others ({', '.join(shared)}); leave it out")


@contextmanager
def _watched(layers: dict[str, torch.nn.Linear], reduce: Reduce, sink: Sink, packed: torch.Tensor | None) -> Generator[None]:
    """Call `sink` with each layer's input (after `reduce`) and output gradient as backward passes it.

    With `packed [B, T]`, the mask of the rows of a packed line, `sink` sees them as padded rows.
    """
    seen: set[str] = set()

    def rows(line: torch.Tensor) -> torch.Tensor:
        return line if packed is None else unpack(line, packed)

    def forward(name: str) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if name in seen:
                raise LlmselectError(f"layers_like: {name} ran twice in one forward pass (reused, or checkpointed); leave it out")
            seen.add(name)
            # Reduced here: between forward and backward only the smaller side is kept.
            kept = reduce(name, args[0].detach())

            def report(gradient: torch.Tensor) -> None:
                sink(name, rows(kept), rows(gradient.detach()))

            out.register_hook(report)

        return hook

    handles = [layer.register_forward_hook(forward(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def graph_from(block: torch.nn.Module, shift: torch.Tensor | None = None) -> Generator[list[torch.Tensor]]:
    """Let the graph start at the input of `block`, moved by `shift`: below it nothing is recorded, and no parameter needs a
    gradient. Yields a list that the forward pass puts this input into."""
    start: list[torch.Tensor] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found: torch.Tensor = (args[0] if args else kwargs["hidden_states"]).detach()
        states = (found if shift is None else found + shift).requires_grad_()
        start.append(states)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield start
    finally:
        handle.remove()


def row_gradients(backbone: Backbone, batch: Batch, layers: dict[str, torch.nn.Linear], reduce: Reduce, sink: Sink,
                  sample: torch.Generator | None = None, packed: bool = False,
                  at_input: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:  # fmt: skip
    """One forward and one backward of the sum over rows of the row's mean response loss; layers report to `sink`.

    With `sample` the labels are drawn from the model's own predictions; `packed` runs the rows as one sequence without
    padding; `at_input` gets the gradient `[B, T, d]` at the input of the lowest block with a layer, 0 at padding. Returns
    the mean response loss of each row `[B]`; NaN for a row without response tokens, whose gradient is 0.
    """
    check_head(backbone)
    lowest = next(block for block in backbone.blocks if any(m in set(layers.values()) for m in block.modules()))
    with torch.enable_grad(), _watched(layers, reduce, sink, batch.mask if packed else None), graph_from(lowest) as start:
        losses, found = backward(backbone, batch, backbone.forward(batch.ids, batch.mask, packed), start, sample)
        if at_input is not None and found is not None:
            at_input(unpack(found, batch.mask) if packed else found)
    return losses


def backward(backbone: Backbone, batch: Batch, states: torch.Tensor, start: list[torch.Tensor],
             sample: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The mean response loss of each row `[B]` (NaN without response tokens), and the gradient of their sum at `start`; None
    when no row of the batch has response tokens."""
    supervised = batch.response[:, 1:]
    row, column = supervised.nonzero(as_tuple=True)
    count = supervised.sum(1)
    if not len(row):
        return torch.full((len(batch.ids),), float("nan")), None
    picked = states[row, column]
    losses, gradient = head_gradients(backbone, picked.detach(), batch.ids[row, column + 1], 1.0 / count[row], sample)
    found = torch.autograd.grad(picked, start, gradient)[0].detach()
    total = torch.zeros(len(count), dtype=torch.float64, device=losses.device).index_add_(0, row, losses.double())
    return (total / count).float(), found


def head_gradients(backbone: Backbone, states: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor,
                   sample: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Losses `[N]` and the gradient `[N, d]` of their weighted sum at the final states, logits a chunk at a time."""
    losses, gradients = list[torch.Tensor](), list[torch.Tensor]()
    size = max(1, CHUNK_LOGITS // backbone.text_config.vocab_size)
    for part, label, w in zip(torch.split(states, size), torch.split(labels, size), torch.split(weight, size), strict=True):
        leaf = part.requires_grad_()
        scores = logits(backbone, leaf)
        if sample is not None:
            label = torch.multinomial(scores.detach().softmax(-1), 1, generator=sample)[:, 0]
        loss = torch.nn.functional.cross_entropy(scores, label, reduction="none")
        gradients.append(torch.autograd.grad((loss * w).sum(), leaf)[0])
        losses.append(loss.detach())
    return torch.cat(losses), torch.cat(gradients)


def outer(gradient: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """Σ_t g_t a_tᵀ of each row, `[B, d_out, d_in]` in fp32."""
    return torch.bmm(gradient.float().transpose(1, 2), activation.float())


def names_of(layers: Sequence[str]) -> list[str]:
    """Layer names without the name of the adapter they belong to: every checkpoint is projected alike."""
    return [re.sub(r"(lora_[AB])\.[^.]+$", r"\1", name) for name in layers]
