"""TRIM: token relevance from attention fingerprints.

Paper: "TRIM: Token-wise Attention-Derived Saliency for Data-Efficient Instruction Tuning", arXiv 2510.07118, section 3.
Objective: on the target rows, per group and token class t (its token id), f_t = normalised Σ α·ĥ over the occurrences
    of t, with unit last states ĥ and saliency α = ½Q + ½K; Q and K are the attention each token spends sharply and
    receives (see `llmselect.engine.attention`), averaged over the last layers and all heads and scaled to [0, 1]
    within the row. On the pool, s_j = ⟨ĥ_j, f_{t_j}⟩, or λ·⟨ĥ_j, f_{t*}⟩ with t* the class nearest in input-embedding
    cosine where t_j has no fingerprint; score = w·mean_j s_j + (1 - w)·max_j s_j.
Inputs: a causal LM, optionally warmed up (`adapter`); 5 to 10 target rows per group.
Cost: one plain forward of the model body over the pool and one gather per group; attention is looked at on the target
    rows only. 2·G bytes a row, and 14·G·`evidence` for the tokens that explain the score.
Deviations: the map from entropy to Q, the normalisation of K, λ, its space and the scope are not published: Q = 1 -
    H/log(visible keys), K = mean over the queries that see the token, λ = 0.5, responses. Special and chat-template
    tokens are left out on both sides: the state of a first token is the same in every row, so its cosine is 1 and the
    maximum would be a constant. Duplicate target rows count once. A class whose saliency is 0 throughout has no
    direction and counts as absent.
Defaults: α_weight ½, w = ½, λ = 0.5, last 4 layers, pool scope `response`, target scope `all`.
Use: 5 to 10 target examples per task, one forward pass, and a wish to see which tokens decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import LlmselectError, UsageError
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


@extractors.register("trim")
@dataclass(frozen=True, kw_only=True)
class Trim(Extractor):
    """Array `value [n, G]` float16, one score per target group, and the `evidence` best tokens of each row and group:
    `top_position`, `top_token`, `top_class` (the class matched: the token itself or the nearest), `top_score`
    `[n, G, evidence]`; position -1 where a row has fewer tokens."""

    fits = True
    by_group = True

    saliency: Literal["attention", "uniform"] = field(
        default="attention", metadata={"help": "uniform weighs all target tokens alike: the ablation without attention"}
    )
    row_signal: Literal["normalized", "inverse"] = field(default="normalized", metadata={"help": "entropy → Q"})
    row_weight: float = field(default=0.5, metadata={"help": "share of Q in α; the rest is K"})
    last_layers: int | None = field(default=4, metadata={"help": "layers whose attention counts; null: all"})
    penalty: float = field(default=0.5, metadata={"help": "λ in (0, 1] for tokens matched to the nearest class"})
    mean_weight: float = field(default=0.5, metadata={"help": "w: share of the mean; the rest is the maximum"})
    scope: Literal["all", "prompt", "response"] = field(default="response", metadata={"help": "pool tokens scored"})
    target_scope: Literal["all", "prompt", "response"] = field(default="all", metadata={"help": "target tokens used"})
    evidence: int = field(default=4, metadata={"help": "tokens kept per row and group to explain the score"})

    def __post_init__(self) -> None:
        for name, low in (("penalty", 0.0), ("row_weight", -1.0), ("mean_weight", -1.0)):
            if not low < getattr(self, name) <= 1 or getattr(self, name) < 0:
                raise UsageError(f"{name}: {getattr(self, name)} is outside {'(0, 1]' if low == 0 else '[0, 1]'}")
        if self.evidence < 1 or (self.last_layers is not None and self.last_layers < 1):
            raise UsageError("evidence and last_layers must be at least 1")

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        shape = (len(groups), self.evidence)
        top: Arrays = {f"top_{name}": ("int32", shape) for name in ("position", "token", "class")}
        return {"value": ("float16", (len(groups),)), **top, "top_score": ("float16", shape)}

    def fit(self, backbone: Backbone, batches: Mapping[str, list[Batch]]) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for g, (group, rows) in enumerate(batches.items()):
            classes, vectors = self._fingerprints(backbone, rows)
            if not len(classes):
                raise LlmselectError(f"target group '{group}': no {self.target_scope} tokens to take a fingerprint from")
            state[f"{g}.classes"], state[f"{g}.vectors"] = classes, vectors
            state[f"{g}.match"] = nearest_class(backbone.causal_lm.get_input_embeddings().weight, classes)
        return state

    def _fingerprints(self, backbone: Backbone, rows: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes `[C]` and unit fingerprints `[C, d]` of one group, accumulated in fp32."""
        import torch

        unique = {row.ids.cpu().numpy().tobytes(): row for row in rows}.values()
        kept = [row.ids[row.scope(self.target_scope)] for row in unique]
        every: Any = torch.cat(kept)
        classes: torch.Tensor = every.unique()
        total: Any = torch.zeros(len(classes), backbone.hidden_size, device=backbone.device)
        for row, ids in zip(unique, kept, strict=True):
            keep = row.scope(self.target_scope)
            alpha, hidden = self._saliency(backbone, row, keep)
            unit = torch.nn.functional.normalize(hidden[keep].float(), dim=-1)
            total.index_add_(0, torch.searchsorted(classes, ids), unit * alpha[keep][:, None])
        norm = total.norm(dim=-1)
        has = norm > 1e-6
        return classes[has], total[has] / norm[has, None]

    def _saliency(self, backbone: Backbone, row: Batch, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from llmselect.engine.attention import attention_statistics

        if self.saliency == "uniform":
            return torch.ones(keep.shape, device=keep.device), row.hidden(-1)
        with attention_statistics(backbone, row.mask, self.last_layers, self.row_signal) as statistics:
            hidden = backbone.states(row.ids, row.mask, (-1,))[backbone.depth]
        q, k = (min_max(signal, keep) for signal in (statistics.row(), statistics.column()))
        return self.row_weight * q + (1 - self.row_weight) * k, hidden

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        linalg: Any = torch.linalg
        keep = batch.scope(self.scope)
        ids, unit = batch.ids[keep], torch.nn.functional.normalize(batch.hidden(-1)[keep].float(), dim=-1)
        groups = sum(key.endswith(".classes") for key in state)
        found: dict[str, list[torch.Tensor]] = {}
        for g in range(groups):
            match = state[f"{g}.match"][ids]
            matched = state[f"{g}.classes"][match]
            similarity = linalg.vecdot(unit, state[f"{g}.vectors"][match])
            similarity = torch.where(matched == ids, similarity, self.penalty * similarity)
            for name, values in self._reduce(keep, similarity, ids, matched).items():
                found.setdefault(name, []).append(values)
        return {name: torch.stack(values, dim=1) for name, values in found.items()}

    def _reduce(self, keep: torch.Tensor, similarity: torch.Tensor, ids: torch.Tensor,
                matched: torch.Tensor) -> dict[str, torch.Tensor]:  # fmt: skip
        """Mean and max of each row's tokens, and its best tokens; a row without tokens gets NaN."""
        import torch

        spread = torch.full(keep.shape, float("-inf"), device=keep.device).masked_scatter(keep, similarity)
        width = min(self.evidence, keep.shape[1])
        top, position = spread.topk(width, dim=1)
        mean = spread.masked_fill(~keep, 0).sum(1) / keep.sum(1)
        score = self.mean_weight * mean + (1 - self.mean_weight) * top[:, 0]
        flat = keep.long().flatten().cumsum(0).view(keep.shape) - 1  # index into the kept tokens
        real = top > float("-inf")
        at = flat.gather(1, position).clamp_min(0)
        chosen = {"top_position": position, "top_token": ids[at] if len(ids) else position,
                  "top_class": matched[at] if len(ids) else position}  # fmt: skip
        pad = (0, self.evidence - width)
        out = {k: torch.nn.functional.pad(v.masked_fill(~real, -1), pad, value=-1).int() for k, v in chosen.items()}
        out["top_score"] = torch.nn.functional.pad(top.masked_fill(~real, 0), pad)
        return {"value": score.masked_fill(~keep.any(1), float("nan")), **out}


def min_max(signal: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Scale the kept tokens of each row of `signal [B, T]` to [0, 1]; a constant row is 1 throughout."""
    low = signal.masked_fill(~keep, float("inf")).amin(1, keepdim=True)
    high = signal.masked_fill(~keep, float("-inf")).amax(1, keepdim=True)
    scaled = (signal - low) / (high - low)
    return scaled.masked_fill((high <= low).expand_as(scaled), 1.0).masked_fill(~keep, 0.0)


def nearest_class(embedding: torch.Tensor, classes: torch.Tensor, block: int = 8192) -> torch.Tensor:
    """For every token of the vocabulary the index in `classes` of its nearest by input-embedding cosine, `[V]`.

    A token that is a class gets itself, also where two tokens share one embedding.
    """
    import torch

    unit = torch.nn.functional.normalize(embedding.float(), dim=-1)
    anchors = unit[classes].T
    match = torch.cat([(part @ anchors).argmax(-1) for part in torch.split(unit, block)])
    match[classes] = torch.arange(len(classes), device=match.device)
    return match
