"""Iterative refinement: select, fine-tune, answer, score, and give more of the next rows to clusters that score high.

Paper: Yu et al., "Diversify and Conquer", arXiv 2409.11378, section 4.
Objective: clusters by k-means; w⁰ uniform. Round r of N: draw the round's share of the budget with cluster weights w, by
    quality inside a cluster; train on all rows drawn so far; answer a probe of rows of each cluster; S(x) = score(x ⊕ gold)
    − score(x ⊕ answer); w by the clusters' mean S (`kernels.reweight`). Nothing reads the weights after the last round, so
    that round only draws.
Deviations: a probe of fixed size in the place of all rows; weights are renormalised and negative scores allowed; training
    starts from the base model in every round.

The loop is a state machine. Every step of every round leaves one JSON file, and a step whose file is there is not done again:
a killed run goes on in the step it was in and ends with the same bytes::

    refine.json                 what this was made from; labels.npy, clusters.json
    round-1/select.json         rows of the round
    round-1/train.json          what the training step returned (adapter/ is the adapter)
    round-1/generate.json       probe and answers
    round-1/score.json          S of each answer
    round-1/reweight.json       mean S and new weight of each cluster
    round-2/…
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import atomic, config
from llmselect.array_views import Subset
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.groups import apportion
from llmselect.kernels.keyed import Keyed, keys_of
from llmselect.kernels.reweight import Update, cluster_means, in_cluster_order, next_rows, reweighted
from llmselect.kernels.topk import topk_stable
from llmselect.selection import Budget, Selection

if TYPE_CHECKING:
    from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs] - it has no types

log = logging.getLogger("llmselect")
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Settings of the loop itself."""

    rounds: int = field(default=3, metadata={"help": "the budget is divided over them"})
    clusters: int | None = field(default=None, metadata={"help": "null: chosen by silhouette"})
    unit: bool = field(default=True, metadata={"help": "cluster directions (cosine) instead of points"})
    tau: float = field(default=1.0, metadata={"help": "drawing by quality, in standard deviations; small: the best rows only"})
    probe: int = field(default=8, metadata={"help": "rows of a cluster that are answered and scored in a round"})
    update: Update = field(default="exp", metadata={"help": "of the weights: exp, paper (clips at 0) or softmax (forgets)"})
    temperature: float = field(default=1.0, metadata={"help": "of the update; small: few clusters take everything"})

    def __post_init__(self) -> None:
        for name in ("rounds", "probe", "clusters"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("tau", "temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}: {getattr(self, name)} must be positive")


@dataclass(frozen=True)
class Round:
    """Where a step stands: `number` (from 1), `folder` for its own files, `trained`: what the training step returned,
    `ids` of the rows asked about."""

    number: int
    folder: Path
    trained: Any = None
    ids: Sequence[str] = ()


@dataclass(frozen=True)
class Steps:
    """What the loop is made of; each may be any callable.

    `train(round, rows)` trains on a Dataset of all rows drawn so far and returns plain JSON, kept as `round.trained`.
    `generate(round, prompts)` answers conversations that end before the assistant's last turn, one text each.
    `score(round, prompts, gold, answers)` gives S of each, NaN for one that cannot be scored; high S: much to learn.
    `fits(messages)`: whether a row can be answered; None: all that have a turn to answer.

    A step that was killed is called again with the same arguments. Among processes launched together all call `train`, the
    first alone calls the others.
    """

    train: Callable[[Round, Dataset], Any]
    generate: Callable[[Round, list[list[Message]]], Sequence[str]]
    score: Callable[[Round, list[list[Message]], list[str], list[str]], Sequence[float]]
    fits: Callable[[list[Message]], bool] | None = None


def rows_per_round(budget: int, rounds: int) -> list[int]:
    """`budget` divided over `rounds` as evenly as whole rows allow, the earlier rounds first.

    Errors: `UsageError` when a round would get none.
    """
    if budget < rounds:
        raise UsageError(f"rounds: {rounds} rounds cannot share {budget} rows; give fewer rounds or a larger budget")
    return apportion(budget, np.ones(rounds), np.full(rounds, budget)).tolist()


def refine(pool: Dataset, x: Any, budget: Any, loop: Loop, steps: Steps, folder: Path | str, *, quality: Any = None,
           seed: int = 0, exclude: Any = None, about: Any = None, process: Any = None) -> Selection:  # fmt: skip
    """Select `budget` rows in rounds. The same call after a kill goes on in the step it was in.

    Args:
        pool: columns `id` and `messages`.
        x: `[n, d]` embedding that rows are clustered by.
        budget: rows or a fraction of the pool.
        folder: of the state files.
        quality: `[n]`, higher is better: inside a cluster rows are drawn with p ∝ exp(z(quality) / tau), else uniformly.
        exclude: row numbers that are never selected.
        about: plain JSON that says what the steps are; a folder whose steps were others is refused.
        process: accelerate's PartialState, when several processes are launched together.

    Returns: rows in the order of rounds; evidence `round` and `cluster`; `provenance["report"]` has cluster sizes and for
        each round rows, mean scores, rows scored and weights by cluster.

    Errors: `UsageError` for a budget in tokens or too small; `LlmselectError` when `folder` was made otherwise, for a feature
        or quality that is not finite, and for answers or scores of a wrong number.
    """
    made = _State(pool, x, Budget.parse(budget), loop, steps, Path(folder), quality, seed, exclude, process)
    made.claim(about)
    return made.run()


class _State:
    """The loop at work; `pick` numbers the rows that may be selected, all arrays are over those."""

    def __init__(self, pool: Any, x: Any, budget: Budget, loop: Loop, steps: Steps, folder: Path, quality: Any,
                 seed: int, exclude: Any, process: Any):  # fmt: skip
        if budget.tokens is not None:
            raise UsageError('refine: a budget in tokens cannot be divided over rounds; give rows or a share ("5%")')
        if x.shape[0] != len(pool) or (quality is not None and quality.shape[0] != len(pool)):
            raise UsageError(f"refine: x and quality need one row for each of the {len(pool)} rows of the pool")
        self.pool, self.loop, self.steps, self.folder, self.seed, self.process = pool, loop, steps, folder, seed, process
        self.pick = np.setdiff1d(np.arange(len(pool)), np.asarray([] if exclude is None else exclude, np.int64))
        self.ids = list(pool["id"])
        self.rng = Keyed(seed, keys_of(self.ids, len(pool))[self.pick])
        self.x, self.budget = x, min(budget.rows_of(len(pool)), len(self.pick))
        self.share = rows_per_round(self.budget, loop.rounds)
        self.quality = None if quality is None else np.asarray(quality[:], np.float64)[self.pick]
        if self.quality is not None:
            topk_stable(self.quality, 0, self.rng.keys)  # names rows without a finite quality

    def claim(self, about: Any) -> None:
        """Say in `refine.json` what the folder is made from, or refuse one made from something else."""
        quality = None if self.quality is None else config.fingerprint(self.quality.tolist())
        key = {"loop": config.to_dict(self.loop), "seed": self.seed, "rows": self.budget, "quality": quality, "about": about,
               "pool": config.fingerprint([self.ids[int(i)] for i in self.pick])}  # fmt: skip
        stored = self.step(self.folder / "refine.json", lambda: key)
        if lines := config.difference(stored, json.loads(json.dumps(key))):
            told = "\n  ".join(lines)
            raise LlmselectError(f"{self.folder} was refined otherwise:\n  {told}\nDelete it, or give the run another out=.")

    def step(self, file: Path, make: Callable[[], Any], everyone: bool = False) -> Any:
        """The content of `file`, made if it is not there: by the first process, or by all of them together."""
        done, main = file.exists(), self.process is None or self.process.is_main_process
        self.wait()  # nobody may write before everybody has looked
        if not done and (main or everyone):
            value = make()
            if main:
                atomic.write_sealed(file, {"value": value})
                log.info("refine: %s", file.relative_to(self.folder).with_suffix(""))
        self.wait()
        return atomic.read_sealed(file, f"delete {self.folder} and run again")["value"]

    def wait(self) -> None:
        """Until every process is here."""
        if self.process is not None:
            self.process.wait_for_everyone()

    def run(self) -> Selection:
        """All rounds."""
        found = self.step(self.folder / "clusters.json", self.cluster)
        file = self.folder / "labels.npy"
        if found.pop("labels", digest := atomic.sha256_file(file)) != digest:  # older versions noted none
            raise LlmselectError(f"{file} is damaged; delete {self.folder} and run again")
        label, sizes, k = np.load(file, allow_pickle=False), np.array(found["sizes"]), len(found["sizes"])
        order = in_cluster_order(label, self.values(), self.rng.keys)
        weights, rows, of_round, rounds = np.full(k, 1 / k), np.zeros(0, np.int64), np.zeros(0, np.int64), list[Any]()
        for number, count in enumerate(self.share, 1):
            here = self.folder / f"round-{number}"
            taken = np.bincount(label[rows], minlength=k)

            def draw(count: int = count, weights: np.ndarray = weights, taken: np.ndarray = taken) -> dict[str, Any]:
                share = apportion(count, weights, sizes - taken)
                return {"rows": next_rows(order, label, taken, share, self.rng.keys).tolist(), "share": share.tolist()}

            drawn = self.step(here / "select.json", draw)
            rows = np.concatenate([rows, np.array(drawn["rows"], np.int64)])
            of_round = np.concatenate([of_round, np.full(len(drawn["rows"]), number)])
            told = {"weights": weights.tolist(), "rows": drawn["share"]}
            if number < len(self.share):
                measured = self.measure(Round(number, here), rows, label, weights)
                weights = np.array(measured["weights"])
                told |= {"scored": measured["scored"], "mean_score": measured["means"]}
            rounds.append(told)
        return self.selection(rows, of_round, label[rows], {**found, "rounds": rounds})

    def measure(self, at: Round, rows: np.ndarray, label: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
        """Train, answer, score, reweigh: the steps after a round's draw."""
        trained = self.step(at.folder / "train.json", lambda: self.steps.train(at, self.pool.select(self.pick[rows])), True)
        asked = self.step(at.folder / "generate.json", lambda: self.answers(Round(at.number, at.folder, trained), rows, label))
        probe = np.array(asked["rows"], np.int64)
        at = Round(at.number, at.folder, trained, [self.ids[int(i)] for i in self.pick[probe]])
        scores = self.step(at.folder / "score.json", lambda: self.scores(at, probe, asked["answers"]))
        values = np.array([np.nan if one is None else one for one in scores["scores"]], np.float64)

        def update() -> dict[str, Any]:
            means = cluster_means(label[probe], values, len(weights))
            new = reweighted(weights, means, self.loop.update, self.loop.temperature)
            scored = np.bincount(label[probe][~np.isnan(values)], minlength=len(weights))
            return {"means": _plain(means), "scored": scored.tolist(), "weights": new.tolist()}

        return self.step(at.folder / "reweight.json", update)

    def cluster(self) -> dict[str, Any]:
        """Cluster the rows once; labels are kept, because other hardware may round other rows to another centroid."""
        from llmselect.kernels.kmeans import candidates_for, kmeans, silhouettes
        from llmselect.kernels.rows import Rows

        x, report = Rows(Subset(self.x, self.pick), normalize=self.loop.unit), dict[str, Any]()
        count = self.loop.clusters
        if count is None:
            tried = silhouettes(x, candidates_for(len(x), self.share[0]), self.rng)
            count = max(tried, key=lambda one: (tried[one], -one), default=1)
            report["silhouettes"] = {str(one): value for one, value in tried.items()}
        made = kmeans(x, count, self.rng)
        buffer = io.BytesIO()
        np.save(buffer, made.label, allow_pickle=False)
        atomic.write_bytes(self.folder / "labels.npy", buffer.getvalue())
        return {"sizes": made.sizes.tolist(), "labels": atomic.sha256_file(self.folder / "labels.npy"), **report}

    def values(self) -> np.ndarray:
        """What rows of a cluster are ranked by: z(quality) / tau + Gumbel noise, or a uniform draw."""
        if self.quality is None:
            return self.rng.uniform("draw")
        z = (self.quality - self.quality.mean()) / max(float(self.quality.std()), 1e-12)
        return z / self.loop.tau - np.log(-np.log(self.rng.uniform("draw")))

    def answers(self, at: Round, rows: np.ndarray, label: np.ndarray) -> dict[str, Any]:
        """A probe of every cluster, drawn from all rows trained on, and its answers."""
        ranked = rows[np.lexsort((self.rng.keys[rows], self.rng.uniform(f"probe {at.number}")[rows], label[rows]))]
        left = np.full(int(label.max()) + 1, self.loop.probe)
        probe, prompts = list[int](), list[list[Message]]()
        for row in ranked.tolist():
            messages: list[Message] = self.pool[int(self.pick[row])]["messages"] if left[label[row]] else []
            if self.asks(messages):
                left[label[row]] -= 1
                probe.append(row)
                prompts.append(messages[:-1])
        if not probe:
            log.warning("refine: round %d has no row that can be answered; weights stay as they are", at.number)
        at = Round(at.number, at.folder, at.trained, [self.ids[int(i)] for i in self.pick[probe]] if probe else [])
        texts = [str(one) for one in self.steps.generate(at, prompts)] if probe else []
        _same_count("generate", texts, probe)
        return {"rows": probe, "answers": texts}

    def asks(self, messages: list[Message]) -> bool:
        """Whether there is a turn to answer that the model has room for."""
        if len(messages) < 2 or messages[-2]["role"] == "assistant":
            return False
        return self.steps.fits is None or bool(self.steps.fits(messages))

    def scores(self, at: Round, probe: np.ndarray, answers: list[str]) -> dict[str, Any]:
        """S of every answer; None where there is none."""
        if not len(probe):
            return {"scores": []}
        messages = [self.pool[int(i)]["messages"] for i in self.pick[probe]]
        found = self.steps.score(at, [one[:-1] for one in messages], [one[-1]["content"] for one in messages], answers)
        _same_count("score", found, probe)
        return {"scores": _plain(np.asarray(found, np.float64))}

    def selection(self, rows: np.ndarray, of_round: np.ndarray, cluster: np.ndarray, report: dict[str, Any]) -> Selection:
        """The rows of all rounds as one selection."""
        about = {"selector": "refine", "config": config.to_dict(self.loop), "seed": self.seed, "n": len(self.pool),
                 "budget": {"rows": self.budget}, "report": report}  # fmt: skip
        indices = self.pick[rows]
        evidence = {"round": of_round, "cluster": cluster}
        return Selection(indices, len(self.pool), None, None, evidence, False, about, [self.ids[int(i)] for i in indices])


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(one) else float(one) for one in values]


def _same_count(step: str, found: Sequence[Any], probe: Any) -> None:
    if len(found) != len(probe):
        raise LlmselectError(f"refine: the step '{step}' gave {len(found)} values for {len(probe)} rows; give one a row")
