"""How near EK-FAC's inverse product is to the dense inverse Fisher, by layer and damping.

    python eval/performance/ekfac_fidelity.py [--rows 1500]

A one-block model of width 8 with random weights, so that the Fisher of a layer can be built densely from synthetic rows.
The vector is a target's mean gradient; beside it the cosine of the plain gradient. Labels are the model's own draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import test_influence as influence

from llmselect.engine import ekfac, gradients

LAYERS = ("k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two vectors, rounded."""
    return round(float(a @ b / a.norm() / b.norm()), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        backbone = influence.narrow(Path(folder))
        data = influence.batches(backbone, a.rows, size=64)
        for which in LAYERS:
            layers = gradients.choose(backbone, which)
            (name,) = layers
            state = ekfac.factors(backbone, layers, data, seed=0)
            flat = influence.explicit(backbone, layers, data, seed=0)[name].flatten(1).double()
            fisher = flat.T @ flat / len(flat)
            v = influence.explicit(backbone, layers, influence.batches(backbone, 40, seed=5))[name].mean(0)
            found[which] = {}
            for damping in (0.1, 1.0, 10.0):
                scale = damping * float(state[f"{name}.scale"].mean())
                dense = torch.linalg.solve(fisher + scale * torch.eye(len(fisher), dtype=torch.float64), v.flatten().double())
                made = ekfac.inverse_product(state, name, v, damping).flatten().double()
                found[which][f"damping {damping}"] = [cosine(made, dense), cosine(v.flatten().double(), dense)]
    told = {"rows": a.rows, "cosine with the dense inverse: EK-FAC, plain gradient": found}
    print(json.dumps(told, indent=2))
    if a.out:
        a.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
