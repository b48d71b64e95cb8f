"""Response losses of a causal LM: negative log-likelihood with and without the prompt, entropy, margin, EL2N, IFD.

Paper: IFD of Li et al., "From Quantity to Quality", arXiv 2308.12032, section 2.2; the perplexity ratio of Li et al.,
    "Superfiltering", arXiv 2402.00530, section 2; EL2N of Paul et al., arXiv 2107.07075, section 2.2.
Objective: over the supervised tokens y of a row, `nll` = mean -log p(y_t | everything before), `nll_alone` = mean
    -log p(y_t | the responses before y_t, no prompts), `ifd` = nll / nll_alone, `ifd_ppl` = exp(nll - nll_alone),
    `entropy` = mean H(p), `margin` = mean difference of the two largest probabilities, `el2n` = mean ‖p - 1_y‖₂. In nats.
Inputs: a causal LM; rows through its chat template.
Cost: one forward with the LM head on supervised tokens only, in chunks; with `without_prompt` a second, shorter one.
Deviations: without its prompt a turn keeps the one token before it (its opening mark), so that both losses average
    over the same tokens; the published code drops the first token instead. EL2N is the mean over tokens, at this one
    model instead of several early in training (`trajectory` has it at checkpoints). Rows whose IFD is 1 or more, which its
    paper leaves out, are ranked like others.
Defaults: both passes.
Use: scores without a target (perplexity, IFD, entropy, EL2N), and the `quality` of other methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch


@extractors.register("loss")
@dataclass(frozen=True, kw_only=True)
class Loss(Extractor):
    """Arrays `[n]` float32: `nll`, `entropy`, `margin`, `el2n`, and with `without_prompt` `nll_alone`, `ifd`, `ifd_ppl`."""

    without_prompt: bool = field(default=True, metadata={"help": "also the loss of the response alone (for IFD)"})

    def views(self) -> tuple[str, ...]:
        return ("row", "response") if self.without_prompt else ("row",)

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        names = ["nll", "entropy", "margin", "el2n", *(["nll_alone", "ifd", "ifd_ppl"] if self.without_prompt else [])]
        return {name: ("float32", ()) for name in names}

    def derive(self, arrays: dict[str, np.ndarray]) -> None:
        if self.without_prompt:
            arrays["ifd"][:] = arrays["nll"] / arrays["nll_alone"]
            arrays["ifd_ppl"][:] = np.exp(arrays["nll"] - arrays["nll_alone"])

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        stats, rows = batch.stats, len(batch.ids)
        nll = stats.mean(stats.nll, rows)
        if batch.view == "response":
            return {"nll_alone": nll}
        more = {name: stats.mean(getattr(stats, name), rows) for name in ("entropy", "margin", "el2n")}
        return {"nll": nll, **more}
