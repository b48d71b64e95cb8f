"""Quad on synthetic pools whose good clusters are known: rows scored, and regret against uniform and full scoring.

    python eval/performance/bandit.py [--rows 20000] [--groups 100] [--good 10] [--seeds 10] [--out FOLDER]

Rewards are N(1, 1) in the good groups and N(0, 1) elsewhere. Per share of the pool scored: the mean reward of the 5 % selected
by `accept: top`, by the best of as many rows drawn uniformly, and by full scoring; and regret per row scored, 1 - mean reward of
the last tenth of the rows. `draws` is Quad as published: its selection and the share that it scored.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from llmselect.selectors.quad import Quad

SHARES = (0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 20_000), ("groups", 100), ("good", 10), ("seeds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    runs = [one(seed, a) for seed in range(a.seeds)]
    found: dict[str, Any] = {"rows": a.rows, "groups": a.groups, "good": a.good, "seeds": a.seeds, "budget": "5%"}
    found["full"] = spread([run["full"] for run in runs])
    found["draws"] = {key: spread([run["draws"][key] for run in runs]) for key in runs[0]["draws"]}
    of = lambda share: {key: spread([run[share][key] for run in runs]) for key in runs[0][share]}  # noqa: E731
    found["by_share"] = {str(share): of(share) for share in SHARES}
    print(json.dumps(found, indent=2))
    if a.out:
        (a.out / "bandit.json").write_text(json.dumps(found, indent=2) + "\n")
        plot(found, a.out / "bandit.svg")


def one(seed: int, a: argparse.Namespace) -> dict[Any, Any]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, a.groups, a.rows)
    x = 2 * rng.standard_normal((a.groups, 32))[label] + rng.standard_normal((a.rows, 32))
    reward, k = rng.standard_normal(a.rows) + (label < a.good), a.rows // 20
    found: dict[Any, Any] = {"full": float(np.sort(reward)[-k:].mean())}
    draws = Quad().select(k, seed=seed, x=x, quality=reward)
    found["draws"] = {"reward": float(reward[draws.indices].mean()), "good": float((label[draws.indices] < a.good).mean()),
                      "share_scored": draws.provenance["report"]["share_scored"]}  # fmt: skip
    for share in SHARES:
        made = Quad(accept="top", share=share).select(k, seed=seed, x=x, quality=reward)
        uniform = rng.permutation(a.rows)[: int(share * a.rows)]
        last = [pull["mean"] for pull in made.provenance["report"]["trace"]]
        found[share] = {"top": float(reward[made.indices].mean()), "uniform": float(np.sort(reward[uniform])[-k:].mean()),
                        "regret": 1 - float(np.mean(last[-max(1, len(last) // 10) :]))}  # fmt: skip
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 3), "sd": round(float(np.std(values, ddof=1)), 3)}


def plot(found: dict[str, Any], path: Path) -> None:
    """Mean reward of the selection against the share scored."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "llmselect"  # the same bytes from the same numbers
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    shares = [float(share) for share in found["by_share"]]
    curves = {"top": "bandit, best rows scored", "uniform": "uniform, best rows scored", "regret": "regret of late pulls"}
    for key, text in curves.items():
        mean = np.array([one[key]["mean"] for one in found["by_share"].values()])
        sd = np.array([one[key]["sd"] for one in found["by_share"].values()])
        axes.plot(shares, mean, marker="o", markersize=3, label=text)
        axes.fill_between(shares, mean - sd, mean + sd, alpha=0.2)
    axes.axhline(found["full"]["mean"], linestyle=":", color="black", label="all rows scored")
    axes.plot(found["draws"]["share_scored"]["mean"], found["draws"]["reward"]["mean"], "s", label="whole draws (Quad)")
    axes.set(xlabel="share of the pool scored", ylabel="reward")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
