"""Which tokens of a row a feature went by (TRIM's evidence), as marked text: for the report and for notebooks."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.notebook import Heat

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.store import FeatureStore

AROUND = 8  # tokens that the report shows on either side of a token that scored
TOPS = ("top_position", "top_token", "top_class", "top_score")


def token_heat(store: FeatureStore, feature: str, pool: Dataset, rows: Sequence[int], model: str, max_length: int | None = None,
               group: int = 0, around: int = 60) -> Heat:  # fmt: skip
    """The best tokens of some rows of `pool` in their places, marked by their scores.

    Args:
        store, feature: a feature that keeps tokens: `trim`.
        pool: the rows that the feature is of.
        rows: row numbers, e.g. `selection.indices[:5]`.
        model, max_length: those of the extractor; only its tokenizer is read.
        group: the number of the target group, in the order of the target's rows.
        around: tokens shown on either side of a token that scored.

    Errors: `UsageError` for a feature that keeps no tokens, and for the rows of another pool.
    """
    opened, chosen = store.open(feature), np.asarray(rows, np.int64)
    if not all(name in opened.spec["arrays"] for name in TOPS):
        raise UsageError(f"'{feature}' keeps no tokens of its rows; a feature of the extractor trim does")
    if len(pool) != opened.n:
        raise UsageError(f"pool: {len(pool)} rows given; '{feature}' is of {opened.n}")
    from llmselect.engine.backbone import Backbone

    tops = {name: np.asarray(store[f"{feature}.{name}"][chosen])[:, group] for name in TOPS}
    encoder = Backbone(model, max_length=max_length).encoder
    messages: list[Any] = [pool[int(row)]["messages"] for row in chosen]
    encoded = encoder.encode(messages)
    return Heat([parts({name: of[i] for name, of in tops.items()}, encoded[i].ids, encoder, around) for i in range(len(chosen))])


def parts(top: dict[str, np.ndarray], ids: np.ndarray | None, encoder: Any, around: int = AROUND) -> list[list[Any]]:
    """`[text, score]` in order: the tokens that scored, and what stands `around` them with score null.

    Token numbers, best first, where there is no tokenizer or it is not the one that made these tokens.
    """
    kept = [i for i in range(len(top["top_position"])) if top["top_position"][i] >= 0]
    found = {int(top["top_position"][i]): (int(top["top_token"][i]), round(float(top["top_score"][i]), 4)) for i in kept}
    if ids is None or any(at >= len(ids) or ids[at] != token for at, (token, _) in found.items()):
        return [[f"token {token} ", score] for token, score in found.values()]

    def text(part: np.ndarray) -> str:
        return encoder.tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False)

    pieces: list[list[Any]] = []
    end = 0
    for at in sorted(found):
        start = max(end, at - around)
        pieces.append([("… " if start > end else "") + text(ids[start:at]), None])
        pieces.append([text(ids[at : at + 1]), found[at][1]])
        end = at + 1
    pieces.append([text(ids[end : end + around]) + (" …" if end + around < len(ids) else ""), None])
    return [piece for piece in pieces if piece[0]]
