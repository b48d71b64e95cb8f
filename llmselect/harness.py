"""Tasks of the LM Evaluation Harness on a model and its adapter, and their scores in the layout that the Hub reads."""

from __future__ import annotations

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
import datetime
import json
import os
import re
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmselect import __version__, atomic
from llmselect.backends import end_tokens, lora_rank
from llmselect.errors import LlmselectError, UsageError, nearest, require
from llmselect.generate import check, open_model

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone

DATA = "LLMSELECT_DATA"
"""The environment variable that names the folder of the suites' data when no argument does."""


def lm_eval(model: str, tasks: Sequence[str], *, adapter: str | None = None, include: str | Path | None = None,
            data: str | Path | None = None, backend: str = "hf", limit: int | None = None, batch_size: int = 8,
            dtype: str = "auto", max_length: int | None = None, chat: bool = True) -> dict[str, Any]:  # fmt: skip
    """Scores of `lm_eval.simple_evaluate` as plain values.

    Args:
        tasks: names: of `eval/suites`, of `include`, else of the tasks that lm-eval brings (which download their data).
        include: a folder of task files in lm-eval's format. Such a file may name Python functions: they run.
        data: the folder that the suites' data lie in; else the environment's `LLMSELECT_DATA`.
        limit: the first rows of each task only.
        chat: render prompts by the chat template that training uses.
        max_length: tokens of prompt and answer; lm-eval cuts a longer prompt from the left and warns.

    Returns:
        `tasks`: task → metric → `{"value", "stderr"}` (None where lm-eval has none); `samples`: task → rows scored;
        `versions`: of the tasks and packages; `settings`: the arguments. On processes other than the first, `{}`.

    Errors: `MissingExtra` without lm-eval (or vllm); `UsageError` for tasks, data, a model or an adapter that is not there,
        before weights load.
    """
    harness: Any = require("lm_eval", "eval")
    check(backend, adapter)
    if limit is not None and limit < 1:
        raise UsageError(f"limit: {limit} leaves no rows; give at least 1, or none for all")
    manager = _manager(list(tasks), include, data)
    backbone = open_model(model, backend, adapter, dtype, max_length)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # lm-eval prints progress: what a script reads stays clean
        lm = _vllm(backbone, stack) if backend == "vllm" else _hf(backbone, batch_size)
        found: Any = harness.simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False,
            bootstrap_iters=1000,
        )  # fmt: skip
    if not found:
        return {}
    settings = {"model": model, "adapter": adapter, "backend": backend, "dtype": _dtype(backbone), "limit": limit,
                "max_length": backbone.encoder.max_length, "chat": chat}  # fmt: skip
    return _plain(found, settings)


def load_rows(file: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The rows of a suite for lm-eval's `custom_dataset`: split `test` of `file`, a JSONL file below the data folder.

    Errors: `UsageError` when no folder is given or the file is not in it; `LlmselectError` naming a line that is no JSON.
    """
    from datasets import Dataset

    from llmselect.formats import Invalid
    from llmselect.readers import read_file

    if not (folder := data or os.environ.get(DATA)):
        raise UsageError(f"the task reads {file} and no data folder is given; type --data DIR (or set {DATA})")
    path = Path(folder).expanduser() / file
    if not path.is_file():
        raise UsageError(f"data: no file {path}; the task reads {file} below the folder given")
    rows = list[dict[str, Any]]()
    for origin, row in read_file(path, 1 << 30):
        if isinstance(row, Invalid):
            raise LlmselectError(f"{path}: {origin}: {row.detail}")
        rows.append(row)
    return {"test": Dataset.from_list(rows)}


def span_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`exact_match` and `f1` of an answer with the best of the references in the JSON list `doc["answer"]`.

    As SQuAD scores: lower case, no punctuation, no articles, words apart by blanks (Rajpurkar et al., 1606.05250, 6.1).
    """
    said = _words(results[0])
    pairs = [(float(said == words), _f1(said, words)) for words in map(_words, json.loads(doc["answer"]))]
    return {"exact_match": max(exact for exact, _ in pairs), "f1": max(f1 for _, f1 in pairs)}


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def suites() -> Path | None:
    """The folder of the task files that come with llmselect: inside the installed package, or in a checkout."""
    here = Path(__file__).parent
    return next((one for one in (here / "suites", here.parent / "eval" / "suites") if one.is_dir()), None)


def _manager(tasks: list[str], include: str | Path | None, data: str | Path | None) -> Any:
    """A task manager that knows `tasks`; the thousands of lm-eval's own are read only for a name found nowhere else."""
    if not tasks:
        raise UsageError("tasks: none given; name at least one, e.g. --tasks gsm8k_chat")
    if include is not None and not Path(include).is_dir():
        raise UsageError(f"include: no folder {include}; give one that holds lm-eval task files (*.yaml)")
    make: Any = require("lm_eval.tasks", "eval")
    folders = [str(one) for one in (suites(), include) if one]
    about: dict[str, Any] = {"data": str(data)} if data else {}
    manager = make.TaskManager(include_path=folders, include_defaults=False, metadata=about)
    local = [name for name in tasks if name in manager.all_tasks]
    if local:
        manager.load(local)  # what they lack shows now, not after the model has loaded
    if len(local) == len(tasks):
        return manager
    own = manager.all_tasks
    manager = make.TaskManager(include_path=folders, metadata=about)
    for name in tasks:
        if name not in manager.all_tasks:
            close = nearest(name, own) or nearest(name, manager.all_tasks)
            raise UsageError(f"tasks: no '{name}'.{close} Here: {', '.join(own)}; others: `lm-eval ls tasks`")
    return manager


def _tokenizer(backbone: Backbone) -> Any:
    """The tokenizer with the chat template of training, and its end of turn as EOS: lm-eval stops at no other mark."""
    tokenizer, end = backbone.tokenizer, backbone.encoder.turn_end()
    tokenizer.chat_template = backbone.encoder.template
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def _dtype(backbone: Backbone) -> str:
    return str(backbone.dtype).removeprefix("torch.")


def _hf(backbone: Backbone, batch_size: int) -> Any:
    registry: Any = require("lm_eval.api.registry", "eval")
    ends = sorted(end_tokens(backbone))
    lm = registry.get_model("hf")(
        pretrained=backbone.path, tokenizer=_tokenizer(backbone), dtype=_dtype(backbone), softmax_dtype="float32",
        max_length=backbone.encoder.max_length, use_safetensors=True, peft=backbone.adapter, batch_size=batch_size,
        device=str(backbone.device),
    )  # fmt: skip
    # Or a row goes on after its end while others of its batch speak, and lm-eval reads what it says there.
    lm.model.generation_config.eos_token_id = ends
    return lm


def _vllm(backbone: Backbone, stack: ExitStack) -> Any:
    registry: Any = require("lm_eval.api.registry", "eval")
    folder = stack.enter_context(tempfile.TemporaryDirectory())  # vLLM reads a tokenizer from files only
    _tokenizer(backbone).save_pretrained(folder)
    lora = {"lora_local_path": backbone.adapter, "max_lora_rank": lora_rank(backbone.adapter)} if backbone.adapter else {}
    return registry.get_model("vllm")(
        pretrained=backbone.path, tokenizer=folder, dtype=_dtype(backbone), max_model_len=backbone.encoder.max_length,
        load_format="safetensors", batch_size="auto", **lora,
    )  # fmt: skip


def _plain(found: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What `simple_evaluate` returns as JSON: lm-eval keeps a value under `metric,filter`, its error beside it."""

    def number(value: Any) -> float | None:
        return float(value) if isinstance(value, int | float) or hasattr(value, "dtype") else None

    tasks: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = metric if kept == "none" else key
            tasks.setdefault(task, {})[name] = {"value": number(value), "stderr": number(values.get(f"{metric}_stderr,{kept}"))}
    packages = {"llmselect": __version__, **{name: version(name) for name in ("lm_eval", "transformers", "torch")}}
    samples = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    return {"tasks": tasks, "samples": samples, "versions": {"tasks": dict(found["versions"]), **packages}, "settings": settings}


def eval_results_yaml(folder: str | Path, results: Mapping[str, Any], datasets: Mapping[str, Mapping[str, str]], *,
                      date: str | None = None, source: Mapping[str, str] | None = None,
                      notes: str | None = None) -> list[Path]:  # fmt: skip
    """Write scores of `lm_eval` as `FOLDER/.eval_results/TASK.yaml`, from where the Hub shows them on a model's page.

    Args:
        folder: the model's repository.
        datasets: task → `id` (of the benchmark on the Hub), `task_id` (its task there), `metric` (of `results`; may be
            left out where a task has one).
        date: ISO 8601; today without it.
        source: `url`, and optionally `name`, `user`, `org`, of where the evaluation can be seen.
        notes: the setting, e.g. `zero-shot, chat template`.

    Errors: `UsageError` for a task or metric that `results` lacks and for fields that are missing or unknown.
    """
    if source is not None and ("url" not in source or set(source) - {"url", "name", "user", "org"}):
        raise UsageError(f"source: {dict(source)} is not allowed; give url, and optionally name, user, org")
    entries = {task: _entry(task, about, results) for task, about in datasets.items()}
    more = {"date": date or datetime.date.today().isoformat(), **({"source": dict(source)} if source else {}),
            **({"notes": notes} if notes else {})}  # fmt: skip
    import yaml

    written = list[Path]()
    for task, entry in entries.items():
        path = Path(folder) / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', task)}.yaml"
        atomic.write_text(path, yaml.safe_dump([{**entry, **more}], sort_keys=False, allow_unicode=True))
        written.append(path)
    return written


def _entry(task: str, about: Mapping[str, str], results: Mapping[str, Any]) -> dict[str, Any]:
    if task not in results["tasks"]:
        raise UsageError(f"datasets: no task '{task}' in the results.{nearest(task, results['tasks'])}")
    if not {"id", "task_id"} <= set(about) <= {"id", "task_id", "metric"}:
        raise UsageError(f"datasets.{task}: {dict(about)} is not allowed; give id, task_id and, where there are several, metric")
    metrics = results["tasks"][task]
    name = about.get("metric", next(iter(metrics)) if len(metrics) == 1 else None)
    if name not in metrics:
        raise UsageError(f"datasets.{task}.metric: {name!r} is not one of {', '.join(metrics)}")
    return {"dataset": {"id": about["id"], "task_id": about["task_id"]}, "value": metrics[name]["value"]}
