"""The command line: `llmselect run RECIPE [key=value …]` and its parts."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmselect import (
    cli_benchmark,
    cli_complete,
    cli_doctor,
    cli_ensemble,
    cli_extension,
    cli_methods,
    cli_models,
    cli_push,
    cli_refine,
)
from llmselect.cli_complete import Json, Overrides, RecipePath, RunFolder, RunFolders
from llmselect.cli_help import MODELS, RESULTS, RUN, Commands, examples
from llmselect.errors import LlmselectError, of_the_machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmselect.stages import Run

    Step = Callable[[Run], Any]

app = typer.Typer(
    # No rich: without it help is there in less than half the time, and its command lines can be copied.
    cls=Commands, rich_markup_mode=None, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Choose the instruction data that a language model should be fine-tuned on.\n\n"
         "A recipe (YAML) names a pool of rows, a few examples of the task you care about, a causal LM, and methods to "
         "compare. `llmselect run RECIPE` extracts features, selects rows with every method, fine-tunes on each selection, "
         "and compares with random selection on held-out rows. Stop it when you like: the same command continues.",
    epilog=examples(
        "llmselect doctor                              # is this machine ready?",
        "llmselect run recipes/quickstart              # the whole loop in minutes, on what ships with the repository",
        "llmselect list                                # the methods",
        "llmselect show trim                           # formula, inputs, cost and paper of one",
        "llmselect run my.yaml budget=1000 --dry-run   # rows, bytes and minutes to expect; any setting as KEY=VALUE",
    ) + "\n\n`llmselect COMMAND -h` explains a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.",
)  # fmt: skip

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
    cli_complete.prepare()
    # The hf CLI starts its extensions by this name (`hf llmselect …`); help should show what was typed.
    called = "hf llmselect" if Path(sys.argv[0]).stem == "hf-llmselect" else None
    try:
        app(standalone_mode=True, prog_name=called)
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
    fits: Step = lambda run: prepare.check_budgets(run.recipe, len(run.pool))  # noqa: E731
    order: dict[str, tuple[Step, ...]] = {
        "extract": (prepare.prepare, fits, stages.extract_stage), "select": (stages.select_stage, refine_stage.refine_stage),
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


def _version(asked: bool) -> None:
    if asked:
        from llmselect import __version__

        print(f"llmselect {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """Options before any command; the help of all is the app's own."""


@app.command(rich_help_panel=RUN, epilog=examples(
    "llmselect run recipes/quickstart --dry-run                     # check it; rows, bytes and minutes to expect",
    "llmselect run recipes/quickstart seeds=[0] budget=10%          # settings of the recipe, for this run",
    "llmselect run runs/quickstart/config.yaml                      # a finished run again: the same bytes",
    "accelerate launch --num_processes 8 -m llmselect run RECIPE    # several GPUs",
))  # fmt: skip
def run(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Extract, select, train and evaluate: from the pool to a table and a report.

    The run folder (`runs/NAME`, or `out:` of the recipe) keeps every part; what is complete is not done again.
    """
    _stages(recipe, overrides, dry_run, as_json, "evaluate")


@app.command(rich_help_panel=RUN, epilog=examples(
    "llmselect extract recipes/quickstart",
    "llmselect extract recipes/quickstart --repair                          # after a disk fault",
    "torchrun --nproc_per_node 2 -m llmselect extract recipes/quickstart    # two processes on CPUs",
))  # fmt: skip
def extract(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False,
            repair: Annotated[bool, typer.Option(help="compute damaged shards again")] = False) -> None:  # fmt: skip
    """Read the pool and compute the recipe's features.

    Any number of processes may stop, start and continue.
    """
    if repair:
        from llmselect import recipe as recipes
        from llmselect.store import FeatureStore

        store = FeatureStore(recipes.load_recipe(recipe, overrides).folder / "features")
        for name in store.names():
            damaged = store.open(name).repair()
            print(f"{name}: {len(damaged)} damaged shards will be computed again", file=sys.stderr)
    _stages(recipe, overrides, dry_run, as_json, "extract")


@app.command(rich_help_panel=RUN, epilog=examples(
    "llmselect select recipes/quickstart",
    "llmselect select recipes/quickstart budget=1000 seeds=[0,1] out=runs/thousand",
))  # fmt: skip
def select(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Select with every method of the recipe, extracting first what is missing."""
    _stages(recipe, overrides, dry_run, as_json, "select")


@app.command(rich_help_panel=RUN, epilog=examples("llmselect train recipes/quickstart train.tokens=20000 out=runs/longer"))
def train(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Fine-tune a LoRA adapter on every selection, at equal tokens."""
    _stages(recipe, overrides, dry_run, as_json, "train")


@app.command(rich_help_panel=RUN, epilog=examples("llmselect evaluate recipes/quickstart --json"))
def evaluate(recipe: RecipePath, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Held-out response loss of base model and adapters, with intervals.

    The last stage of a run, and so the same as `llmselect run`.
    """
    _stages(recipe, overrides, dry_run, as_json, "evaluate")


for module in (cli_methods, cli_models, cli_benchmark, cli_ensemble, cli_push, cli_refine, cli_doctor, cli_complete,
               cli_extension):  # fmt: skip
    module.add_to(app)

sae_app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None,
                      help="Sparse autoencoders: train one on a pool, read what its latents mean.")  # fmt: skip
app.add_typer(sae_app, name="sae", rich_help_panel=MODELS)


@sae_app.command("train", epilog=examples("llmselect sae train recipes/mona sae.k=64 sae.tokens=50000000"))
def sae_train(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train the SAE of the recipe's `sae:` section on its pool; resumes.

    Prints the variance left unexplained on held-out rows, L0 and dead latents.
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


@sae_app.command("describe", epilog=examples("llmselect sae describe recipes/quickstart --latents 12,845 --rows 3"))
def sae_describe(recipe: RecipePath, overrides: Overrides = None,
                 latents: Annotated[str | None, typer.Option(help="e.g. 12,845; default: those that decide most")] = None,
                 rows: Annotated[int, typer.Option(help="rows shown per latent")] = 5,
                 as_json: Json = False) -> None:  # fmt: skip
    """Show the rows and tokens that fire latents most.

    Without `--latents`: those that decided most in the run's MONA selections.
    """
    from llmselect import latents as latents_of
    from llmselect import recipe as recipes
    from llmselect import stages
    from llmselect.sae import describe

    found = latents_of.describe_latents(stages.Run(recipes.load_recipe(recipe, overrides)), latents, rows)
    print(json.dumps(found) if as_json else describe.text(found))


@app.command(rich_help_panel=RESULTS, epilog=examples("llmselect report runs/quickstart --out quickstart.html"))
def report(folder: RunFolder,
           out: Annotated[Path | None, typer.Option(help="file to write; default: report.html in the folder")] = None,
           sample: Annotated[int, typer.Option(help="the most rows of the pool on the page")] = 4000,
           as_json: Json = False) -> None:  # fmt: skip
    """One HTML page of a run: results, a map of the pool, and rows with why they were picked.

    It opens without a network and can be mailed. `llmselect run` ends with it.
    """
    from llmselect.report import write_report

    file = write_report(folder, out, sample)
    print(json.dumps({"report": str(file), "bytes": file.stat().st_size}) if as_json else f"report: {file}")


@app.command(rich_help_panel=RESULTS, epilog=examples(
    "llmselect compare runs/quickstart",
    "llmselect compare runs/a runs/b --json",
))  # fmt: skip
def compare(runs: RunFolders, as_json: Json = False) -> None:
    """Overlap, sources, lengths and scores of the selections of runs."""
    from llmselect.compare import compare as compared

    found = compared(runs)
    if as_json:
        print(json.dumps(found))
        return
    for i, (name, about) in enumerate(found["selections"].items()):
        score = "-" if about["mean_score"] is None else f"{about['mean_score']:.3f}"
        length = about["score_length_correlation"]
        related = "" if length is None else f" (correlation with length {length:+.2f})"
        nearer = "" if about["kl_reduction"] is None else f", n-grams {about['kl_reduction']:+.3f} nats nearer to the target"
        mix = ", ".join(f"{s} {c / about['rows']:.0%}" for s, c in list(about["sources"].items())[:5])
        print(f"[{i}] {name}: {about['rows']} rows, {about['tokens']} tokens (median {about['tokens_per_row'][1]:.0f}), "
              f"score {score}{related}{nearer}\n     {mix}")  # fmt: skip
    print("\noverlap (Jaccard)\n      " + " ".join(f"[{i:>2}]" for i in range(len(found["names"]))))
    for i, line in enumerate(found["overlap"]):
        print(f"[{i:>2}]  " + " ".join(f"{value:.2f}" for value in line))
