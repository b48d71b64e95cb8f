"""The command line: `llmselect run RECIPE [key=value …]` and its parts."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmselect import cli_benchmark, cli_ensemble, cli_models, cli_push, cli_refine
from llmselect.errors import LlmselectError, of_the_machine

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Choose the instruction data that a language model should be fine-tuned on.\n\n"
         "A **recipe** (YAML) names a pool, a few target examples, a causal LM and methods. `llmselect run RECIPE` extracts "
         "features, selects, fine-tunes, and compares with random selection on held-out rows. Every stage resumes where it "
         "stopped. Start with: `llmselect run recipes/quickstart`.",
)  # fmt: skip

RecipePath = Annotated[Path, typer.Argument(help="a recipe file, or a folder that holds recipe.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value settings, e.g. budget=10% train.tokens=100000")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for a script")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check the recipe and print rows, bytes and minutes to expect")]


def main() -> None:
    """Entry point: exit 0 done, 1 failed run, 2 wrong usage, 130 stopped by Ctrl-C."""
    quiet = int(os.environ.get("RANK", "0")) > 0
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("transformers", "datasets", "accelerate", "trl", "peft", "httpx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings print signed addresses of uploads
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the bars of a hundred model loads hide our own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except LlmselectError as error:
        print(f"llmselect: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if (told := of_the_machine(error)) is None:
            raise
        print(f"llmselect: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nllmselect: stopped; type the same command to continue", file=sys.stderr)
        sys.exit(130)


def _stages(recipe: Path, overrides: list[str] | None, dry_run: bool, as_json: bool, last: str) -> None:
    from llmselect import recipe as recipes

    plan = recipes.load_recipe(recipe, overrides)
    if dry_run:
        from llmselect import estimate

        found = estimate.estimate(plan)
        print(json.dumps(found) if as_json else estimate.text(found, plan))
        return
    _run(plan, last, as_json)


def _run(plan: Any, last: str, as_json: bool) -> None:
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other, not for this user
    from llmselect import comparison, prepare, refine_stage, stages

    run = stages.Run(plan)
    order = {"extract": (prepare.prepare, stages.extract_stage), "select": (stages.select_stage, refine_stage.refine_stage),
             "train": (comparison.train_stage,), "evaluate": (comparison.evaluate_stage,)}  # fmt: skip
    table = None
    for name, steps in order.items():
        for step in steps:
            table = step(run)
        if name == last:
            break
    if run.process.is_main_process:
        if last == "evaluate":
            results = run.folder / ("results.json" if as_json else "results.md")
            print(results.read_text("utf-8") if table else f"done: {run.folder}")
            _closing(run, as_json)
        else:
            print(json.dumps({"run": str(run.folder)}) if as_json else f"{last}: done in {run.folder}")


def _closing(run: Any, as_json: bool) -> None:
    """Make the report and tell where it is. A run that has its results has not failed for want of a page."""
    from llmselect.report import write_report

    try:
        with run.timed("report"):
            told = f"report: {write_report(run)}"
    except Exception as error:
        again = f"llmselect report {run.folder}"
        told = f"no report: {type(error).__name__}: {error}; to try again, type: {again}"
    print(told, file=sys.stderr if as_json else sys.stdout)


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Extract, select, train and evaluate: pool to table.

    Example: `llmselect run recipes/quickstart seeds=[0] budget=10%`. Several processes:
    `accelerate launch -m llmselect run RECIPE`.
    """
    _stages(recipe, overrides, dry_run, as_json, "evaluate")


@app.command()
def extract(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False,
            repair: Annotated[bool, typer.Option(help="compute damaged shards again")] = False) -> None:  # fmt: skip
    """Read the pool and compute the recipe's features; resumes, on any number of processes."""
    if repair:
        from llmselect import recipe as recipes
        from llmselect.store import FeatureStore

        store = FeatureStore(recipes.load_recipe(recipe, overrides).folder / "features")
        for name in store.names():
            damaged = store.open(name).repair()
            print(f"{name}: {len(damaged)} damaged shards will be computed again", file=sys.stderr)
    _stages(recipe, overrides, dry_run, as_json, "extract")


@app.command()
def select(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Select with every method of the recipe, extracting first what is missing."""
    _stages(recipe, overrides, dry_run, as_json, "select")


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Fine-tune a LoRA adapter on every selection, at equal tokens."""
    _stages(recipe, overrides, dry_run, as_json, "train")


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Held-out response loss of base model and adapters, with intervals; the same as `run`."""
    _stages(recipe, overrides, dry_run, as_json, "evaluate")


@app.command("list")
def list_methods(as_json: Json = False) -> None:
    """All selectors, extractors and schedules, also those of other installed packages."""
    from llmselect.registry import describe, extractors, schedules, selectors

    kinds = (selectors, extractors, schedules)
    found = {kind.kind: {n: describe(kind.get(n))["title"] for n in kind.names()} for kind in kinds}
    if as_json:
        print(json.dumps(found))
        return
    for kind, methods in found.items():
        print(f"{kind}s")
        for name, title in methods.items():
            print(f"  {name:<14} {title}")
    print("\nllmselect show NAME tells a method's formula, inputs, cost and paper.")


@app.command()
def show(name: Annotated[str, typer.Argument(help="a selector, an extractor or a schedule")], as_json: Json = False) -> None:
    """A method's formula, inputs, cost, paper and parameters."""
    from llmselect.errors import UsageError, nearest
    from llmselect.registry import SECTIONS, describe, extractors, schedules, selectors

    homes = {name: kind for kind in (schedules, extractors, selectors) for name in kind.names()}
    if name not in homes:
        raise UsageError(f"no method '{name}'.{nearest(name, homes)} One of: {', '.join(homes)}")
    about = describe(homes[name].get(name))
    if as_json:
        print(json.dumps(about, default=str))
        return
    print(f"{name}: {about['title']}\n")
    for section in SECTIONS:
        print(f"{section}: {about.get(section, '-')}\n")
    print("Parameters")
    for one in about["parameters"]:
        print(f"  {one['name']:<16} {one['default']!s:<14} {one['help'] or one['type']}")


cli_models.add_to(app)
cli_benchmark.add_to(app)
cli_ensemble.add_to(app)
cli_push.add_to(app)
cli_refine.add_to(app)

sae_app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders: train one on a pool, read what its latents mean.")
app.add_typer(sae_app, name="sae")


@sae_app.command("train")
def sae_train(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train the SAE of the recipe's `sae:` section on its pool; resumes. Prints held-out variance unexplained, L0, dead latents.

    Example: `llmselect sae train recipes/mona sae.k=64 sae.tokens=50000000`.
    """
    from dataclasses import asdict

    from llmselect import prepare, stages
    from llmselect import recipe as recipes
    from llmselect.errors import UsageError

    plan = recipes.load_recipe(recipe, overrides)
    if plan.sae is None:
        raise UsageError("the recipe has no sae: section; give one, e.g. sae.tokens=2000000")
    run = stages.Run(plan)
    prepare.prepare(run)
    report = stages.sae_stage(run)
    print(json.dumps(asdict(report)) if as_json else f"{report.describe()}\nsaved: {run.folder / 'sae'}")


@sae_app.command("describe")
def sae_describe(recipe: RecipePath, overrides: Overrides = None,
                 latents: Annotated[str | None, typer.Option(help="e.g. 12,845; default: those that decide most")] = None,
                 rows: Annotated[int, typer.Option(help="rows shown per latent")] = 5,
                 as_json: Json = False) -> None:  # fmt: skip
    """Show the pool rows and tokens that fire latents most. Without `--latents`: the evidence of the run's MONA selections."""
    from llmselect import latents as latents_of
    from llmselect import recipe as recipes
    from llmselect import stages
    from llmselect.sae import describe

    found = latents_of.describe_latents(stages.Run(recipes.load_recipe(recipe, overrides)), latents, rows)
    print(json.dumps(found) if as_json else describe.text(found))


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
           out: Annotated[Path | None, typer.Option(help="file to write; default: report.html in the folder")] = None,
           sample: Annotated[int, typer.Option(help="the most rows of the pool on the page")] = 4000,
           as_json: Json = False) -> None:  # fmt: skip
    """One HTML page of a run: map of the pool, results, distributions, overlap, and every row with why it was picked.

    Example: `llmselect report runs/quickstart --out report.html`. It opens without a network.
    """
    from llmselect.report import write_report

    file = write_report(folder, out, sample)
    print(json.dumps({"report": str(file), "bytes": file.stat().st_size}) if as_json else f"report: {file}")


@app.command()
def compare(runs: Annotated[list[Path], typer.Argument(help="folders of runs")], as_json: Json = False) -> None:
    """Overlap, source mix, lengths and scores of the selections of one or several runs."""
    from llmselect.compare import compare as compared

    found = compared(runs)
    if as_json:
        print(json.dumps(found))
        return
    for i, (name, about) in enumerate(found["selections"].items()):
        score = "-" if about["mean_score"] is None else f"{about['mean_score']:.3f}"
        length = about["score_length_correlation"]
        mix = ", ".join(f"{s} {c / about['rows']:.0%}" for s, c in list(about["sources"].items())[:5])
        print(f"[{i}] {name}: {about['rows']} rows, {about['tokens']} tokens (median {about['tokens_per_row'][1]:.0f}), "
              f"score {score}{'' if length is None else f' (correlation with length {length:+.2f})'}\n     {mix}")  # fmt: skip
    print("\noverlap (Jaccard)\n      " + " ".join(f"[{i:>2}]" for i in range(len(found["names"]))))
    for i, line in enumerate(found["overlap"]):
        print(f"[{i:>2}]  " + " ".join(f"{value:.2f}" for value in line))
