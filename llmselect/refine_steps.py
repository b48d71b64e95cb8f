"""The `refine:` section of a recipe, and the steps that it describes: LoRA training, generation, a scorer."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmselect.backends import Sampling
from llmselect.errors import UsageError, nearest
from llmselect.refine import Loop, Message, Round, Steps
from llmselect.selection import Budget
from llmselect.train import Train

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.recipe import Recipe

ADAPTER = "adapter"
OWN = ("current", "base")


@dataclass(frozen=True, kw_only=True)
class Refine(Loop):
    """Iterative refinement as a method of a recipe."""

    x: str = field(metadata={"help": "feature to cluster by, e.g. an embedding"})
    quality: str | None = field(default=None, metadata={"help": "feature to draw by inside a cluster; null: uniformly"})
    method: str = field(default="iterative", metadata={"help": "name of the selection beside those of methods"})
    scorer: Literal["perplexity", "reward"] = "perplexity"
    judge: str = field(
        default="current",
        metadata={"help": "who scores: current (the model just trained), base, or a folder or Hub id; reward needs a model"},
    )
    judge_max_length: int | None = field(default=None, metadata={"help": "tokens that the judge reads; null: its limit"})
    train: Train | None = field(default=None, metadata={"help": "of the rounds; null: the recipe's train"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens of an answer"})
    sampling_temperature: float = field(default=0.0, metadata={"help": "of answers; 0: always the likeliest token"})
    top_p: float = 1.0
    backend: str = field(default="hf", metadata={"help": "hf or vllm"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer == "reward" and self.judge in OWN:
            raise UsageError(f"judge: {self.judge!r} gives no rewards; give the folder or Hub id of a reward model")
        self.sampling(0)

    def sampling(self, seed: int) -> Sampling:
        """How answers are drawn."""
        return Sampling(self.max_new_tokens, self.sampling_temperature, self.top_p, seed)


@dataclass(frozen=True)
class ModelSteps:
    """Training, generation and scoring with real models; `steps` is what the loop takes.

    A round trains an adapter of `model` from new on all rows drawn so far, answers with it, and scores with the judge:
    `current` is that adapter, `base` is `model` as it is, anything else a model of its own.
    """

    settings: Refine
    model: str
    train: Train
    seed: int = 0
    dtype: str = "auto"
    max_length: int | None = None
    batch_tokens: int | None = None

    @property
    def steps(self) -> Steps:
        return Steps(self.trained, self.answered, self.scored, _Room(self.model, self.max_length, self.settings.max_new_tokens))

    def trained(self, at: Round, rows: Dataset) -> dict[str, Any]:
        """Fine-tune the base model on `rows`; what is returned does not depend on the clock."""
        from llmselect.train import finetune

        about = {"method": self.settings.method, "round": at.number, "rows": len(rows)}
        made = finetune(rows, self.model, at.folder / ADAPTER, self.train, seed=self.seed, dtype=self.dtype,
                        max_length=self.max_length, provenance=about)  # fmt: skip
        _free()
        return {"adapter": ADAPTER, "steps": made.steps, "tokens": made.tokens, "train_loss": made.train_loss}

    def answered(self, at: Round, prompts: list[list[Message]]) -> list[str]:
        """Answers of the model just trained, by way of a file that a killed run continues."""
        from dataclasses import asdict

        from llmselect.generate import generate_to

        file = generate_to(at.folder / "answers.jsonl", at.ids, prompts, model=self.model, adapter=self._adapter(at),
                           backend=self.settings.backend, batch_tokens=self.batch_tokens, dtype=self.dtype,
                           max_length=self.max_length, **asdict(self.settings.sampling(self.seed)))  # fmt: skip
        _free()
        return [json.loads(line)["text"] for line in file.read_bytes().splitlines()]

    def scored(self, at: Round, prompts: list[list[Message]], gold: list[str], answers: list[str]) -> Sequence[float]:
        """S of every answer by the judge."""
        from llmselect import judges

        own = self.settings.judge in OWN
        model, limit = (self.model, self.max_length) if own else (self.settings.judge, self.settings.judge_max_length)
        shared: dict[str, Any] = {"model": model, "dtype": self.dtype, "max_length": limit, "batch_tokens": self.batch_tokens}
        if self.settings.scorer == "reward":
            found = judges.reward(prompts, gold, answers, **shared)
        else:
            adapter = self._adapter(at) if self.settings.judge == "current" else None
            found = judges.perplexity(prompts, gold, answers, adapter=adapter, **shared)
        _free()
        return found.tolist()

    def _adapter(self, at: Round) -> str:
        return str(at.folder / at.trained["adapter"])


class _Room:
    """Whether the model has room for a prompt and its answer."""

    def __init__(self, model: str, max_length: int | None, max_new_tokens: int):
        self.model, self.max_length, self.new, self.encoder = model, max_length, max_new_tokens, None

    def __call__(self, messages: list[Message]) -> bool:
        if self.encoder is None:
            from llmselect.engine.backbone import Backbone

            self.encoder = Backbone(self.model, max_length=self.max_length).encoder
        text = self.encoder.render(messages[:-1], add_generation_prompt=True)
        ids = self.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return len(ids) + self.new <= self.encoder.max_length


def check(settings: Refine, recipe: Recipe) -> None:
    """What can be wrong with the section in its recipe, without reading data or loading a model.

    Errors: `UsageError`; `MissingExtra` without FAISS or the backend of generation.
    """
    from importlib.util import find_spec

    from llmselect import generate
    from llmselect.errors import MissingExtra
    from llmselect.recipe import looks_like_path
    from llmselect.train import validate

    _check_places(settings, recipe)
    generate.check(settings.backend, None)
    if find_spec("faiss") is None:
        raise MissingExtra("refine: clustering needs FAISS: pip install 'llmselect[cluster]'")
    limit = recipe.model.max_length
    if limit is not None and settings.max_new_tokens >= limit:
        raise UsageError(
            f"refine.max_new_tokens: {settings.max_new_tokens} leaves no room for a prompt in model.max_length={limit}; lower it"
        )
    judge = settings.judge
    if judge not in OWN and looks_like_path(judge) and not (Path(judge) / "config.json").is_file():
        raise UsageError(f"refine.judge: {judge} is no folder with a config.json; give current, base, a model folder or Hub id")
    if settings.train:
        validate(settings.train, "refine.train")


def _check_places(settings: Refine, recipe: Recipe) -> None:
    """The section against features, methods and budget of its recipe."""
    for key in ("x", "quality"):
        feature = getattr(settings, key)
        if feature is None:
            continue
        if feature.partition(".")[0] not in recipe.features:
            raise UsageError(f"refine.{key}: no feature {reprlib.repr(feature)}.{nearest(feature, recipe.features)} "
                             f"There are: {list(recipe.features)}")  # fmt: skip
        if recipe.lazy(feature):
            raise UsageError(f"refine.{key}: all of it is read; give features.{feature.partition('.')[0]} lazy: false")
    if settings.method in recipe.methods:
        raise UsageError(f"refine.method: '{settings.method}' is also in methods; give another name")
    if Budget.parse(recipe.budget).tokens is not None:
        raise UsageError("budget: refine divides rows over rounds, not tokens; give rows or a share, e.g. budget=5%")


def _free() -> None:
    """Give back the memory of a model that the next step does not need."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
