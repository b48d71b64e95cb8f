"""Commands about one model rather than a recipe: `llmselect generate`, `llmselect lm-eval`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from llmselect.cli_complete import argument
from llmselect.cli_help import MODELS, examples
from llmselect.errors import UsageError

Model = Annotated[str, argument("folder or Hub id of a causal LM (safetensors)", "MODEL")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter: folder or Hub id")]
Engine = Annotated[str, typer.Option("--backend", help="hf (transformers) or vllm", autocompletion=lambda: ["hf", "vllm"])]
Dtype = Annotated[str, typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU")]
MaxLength = Annotated[int | None, typer.Option(help="tokens of prompt and answer; default: the model's limit, at most 2048")]
Limit = Annotated[int | None, typer.Option(help="only the first rows")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for a script")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    adapter = "--adapter runs/quickstart/adapters/trim/seed-0"
    app.command(rich_help_panel=MODELS, epilog=examples(
        "llmselect generate MODEL prompts.jsonl answers.jsonl --limit 100",
        f"llmselect generate MODEL prompts.jsonl answers.jsonl {adapter}",
    ))(generate)  # fmt: skip
    app.command("lm-eval", rich_help_panel=MODELS, epilog=examples(
        f"llmselect lm-eval MODEL --tasks gsm8k_chat,mmlu_chat --data targets {adapter}",
    ))(lm_eval)  # fmt: skip


def generate(model: Model,
             prompts: Annotated[Path, argument("rows of any format that pools have; answers in them are not shown", "PROMPTS")],
             out: Annotated[Path, argument("JSONL file to write: id, text, tokens, finish", "OUT")],
             adapter: Adapter = None, backend: Engine = "hf",
             max_new_tokens: Annotated[int, typer.Option(help="tokens an answer may have")] = 256,
             temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.0,
             top_p: Annotated[float, typer.Option(help="draw from the fewest tokens with this mass")] = 1.0,
             seed: Annotated[int, typer.Option(help="of the draws")] = 0,
             stop: Annotated[list[str] | None, typer.Option(help="text that ends an answer; may be repeated")] = None,
             batch_tokens: Annotated[int | None, typer.Option(help="padded tokens of a batch (hf)")] = None,
             dtype: Dtype = "auto", max_length: MaxLength = None, limit: Limit = None,
             as_json: Json = False) -> None:  # fmt: skip
    """Answer the prompts of a file.

    The same command after a kill goes on where it stopped.
    """
    from llmselect.generate import generate_to

    ids, asked = read_prompts(prompts, limit)
    generate_to(out, ids, asked, model=model, adapter=adapter, backend=backend, max_new_tokens=max_new_tokens,
                temperature=temperature, top_p=top_p, seed=seed, stop=stop or (), batch_tokens=batch_tokens, dtype=dtype,
                max_length=max_length)  # fmt: skip
    told = {"out": str(out), "rows": len(ids)}
    typer.echo(json.dumps(told) if as_json else f"{len(ids)} answers in {out}")


def read_prompts(path: Path, limit: int | None = None) -> tuple[list[str], list[list[dict[str, str]]]]:
    """Ids and conversations of a file's rows, each without the assistant's turns that end it; rows without an `id` are
    numbered.

    Errors: `UsageError` for a file that is not there and naming a row that cannot be asked.
    """
    from llmselect.formats import Invalid, to_prompt
    from llmselect.readers import check_source, read_file

    if limit is not None and limit < 1:
        raise UsageError(f"limit: {limit} leaves no rows; give at least 1")
    if not path.is_file():
        raise UsageError(f"prompts: no file {path}")
    check_source(str(path), "prompts")
    ids: list[str] = []
    asked: list[list[dict[str, str]]] = []
    for origin, row in read_file(path, 1 << 30):
        try:
            if isinstance(row, Invalid):
                raise row
            asked.append(to_prompt(row))
        except Invalid as error:
            raise UsageError(f"prompts: {path}: {origin}: {error.detail}") from error
        ids.append(str(row["id"]) if row.get("id") is not None else str(len(ids)))
        if len(ids) == limit:
            break
    return ids, asked


def lm_eval(model: Model,
            tasks: Annotated[str, typer.Option(help="names with commas between, e.g. gsm8k_chat,mmlu_chat")],
            data: Annotated[Path | None, typer.Option(help="folder with gsm8k/test.jsonl.gz and the like")] = None,
            adapter: Adapter = None,
            include: Annotated[Path | None, typer.Option(help="folder of lm-eval task files; may run their code")] = None,
            backend: Engine = "hf",
            batch_size: Annotated[int, typer.Option(help="rows of a batch (hf)")] = 8,
            dtype: Dtype = "auto", max_length: MaxLength = None, limit: Limit = None,
            chat: Annotated[bool, typer.Option(help="render prompts by the chat template")] = True,
            as_json: Json = False) -> None:  # fmt: skip
    """Scores of LM Evaluation Harness tasks (extra `eval`).

    gsm8k_chat, mmlu_chat, csqa_chat, bbh_chat and xquad_chat read files below `--data`.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it explains its own metadata for every task
    from llmselect import harness

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = harness.lm_eval(model, names, adapter=adapter, include=include, data=data, backend=backend, limit=limit,
                            batch_size=batch_size, dtype=dtype, max_length=max_length, chat=chat)  # fmt: skip
    if found:  # empty on processes other than the first
        typer.echo(json.dumps(found) if as_json else _table(found))


def _table(found: dict[str, Any]) -> str:
    lines = ["| task | metric | value | stderr | rows |", "|---|---|---|---|---|"]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    for task, metrics in found["tasks"].items():
        for metric, one in metrics.items():
            rows = found["samples"].get(task, "")
            lines.append(f"| {task} | {metric} | {number(one['value'])} | {number(one['stderr'])} | {rows} |")
    return "\n".join(lines)
