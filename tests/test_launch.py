"""The recipes of `recipes/launch`: their files are sound, and they run with a tiny model and local rows in the Hub's places."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from llmselect import prepare, stages
from llmselect.errors import UsageError
from llmselect.recipe import load_recipe
from llmselect.selection import Selection

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "recipes/launch"
RECIPES = ("smollm2-dolly", "qwen-smoltalk", "llama-tulu")


def test_every_file_of_the_folder_is_tested():
    known = {*(f"{name}.yaml" for name in RECIPES), "ddp.yaml", "fsdp.yaml", "slurm.sbatch", "README.md"}
    assert {f.name for f in LAUNCH.iterdir()} == known


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Local files with the columns of the Hub's: dolly, gsm8k, mbpp, and pools of messages."""
    folder = tmp_path_factory.mktemp("rows")
    said = [(chat[-2]["content"], chat[-1]["content"]) for chat in tiny.chats(60)]
    asked = [(f"Q: {a}", f"A: {b}") for a, b in said]
    kinds = {
        "dolly": [{"instruction": q, "context": "c" * (i % 3), "response": a, "category": f"k{i % 4}"}
                  for i, (q, a) in enumerate(said)],
        "messages": [{"messages": chat, "source": f"s{i % 3}"} for i, chat in enumerate(tiny.chats(60))],
        "gsm8k": [{"question": q, "answer": a} for q, a in asked],
        "mbpp": [{"text": q, "code": a} for q, a in asked[::-1]],
    }  # fmt: skip
    for name, made in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def overrides(name: str, rows: Path, model: Path, out: Path) -> list[str]:
    """What puts the tiny model and the local rows into a recipe."""
    pool = rows / ("dolly.jsonl" if name == "smollm2-dolly" else "messages.jsonl")
    tasks = ["gsm8k"] if name == "smollm2-dolly" else ["gsm8k", "mbpp"]
    told = [f"targets.{t}.{side}={rows / t}.jsonl" for t in tasks for side in ("dev", "test")]
    return [f"model.path={model}", "model.dtype=float32", "model.max_length=200", f"pool.path={pool}", *told, "budget=9",
            "pool.decontaminate=false", f"out={out}", "seeds=[0]"]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_with_other_rows_and_model_in_its_places(name, rows, tiny_model, tmp_path):
    run = stages.Run(load_recipe(LAUNCH / f"{name}.yaml", overrides(name, rows, tiny_model, tmp_path)))
    for stage in (prepare.prepare, stages.extract_stage, stages.select_stage):
        stage(run)
    for method in run.recipe.methods:
        assert len(Selection.load(tmp_path / f"selections/{method}/seed-0")) == 9
    assert run.target[0]["messages"][0]["content"].startswith("Q: ") and len(run.target) == 10 * len(run.recipe.targets)
    if name == "smollm2-dolly":
        assert set(run.pool["source"]) == {"k0", "k1", "k2", "k3"}
        assert any("\n\nc" in row["messages"][0]["content"] for row in run.pool), "dolly's context is part of the question"


def test_the_hub_is_asked_for_subset_and_splits(tiny_model, tmp_path, monkeypatch):
    asked, chats = [], tiny.chats(60)

    def load_dataset(name, subset=None, *, split):
        asked.append((name, subset, split))
        start = {"org/pool": 0, "org/task": 30}[name] + (10 if split == "test" else 0)
        columns = [{"q": chat[-2]["content"], "a": chat[-1]["content"]} for chat in chats[start : start + 10]]
        return [{"messages": chat} for chat in chats[:30]] if name == "org/pool" else columns

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = {"dev": "org/task", "test": "org/task", "subset": "main", "columns": {"prompt": "q", "completion": "a"}}
    plan = {"name": "hub", "out": str(tmp_path / "run"), "model": {"path": str(tiny_model), "max_length": 200},
            "pool": {"path": "org/pool", "subset": "all"}, "targets": {"t": task},
            "methods": {"random": {"selector": "random"}}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(plan))
    run = stages.Run(load_recipe(tmp_path))
    prepare.prepare(run)
    assert asked == [("org/task", "main", "train"), ("org/task", "main", "test"), ("org/pool", "all", "train")]
    assert [r["messages"][0]["content"] for r in run.target] == [c[-2]["content"] for c in chats[30:40]]
    (tmp_path / "recipe.yaml").write_text(json.dumps({**plan, "targets": {"t": {**task, "test_split": "dev"}}}))
    prepare.prepare(stages.Run(load_recipe(tmp_path)))
    assert ("org/task", "main", "dev") in asked, "another split is other rows: they are read again"


def test_a_failing_hub_says_which_subset(monkeypatch):
    from llmselect.pool import load_pool

    def load_dataset(name, subset=None, *, split):
        raise ValueError("Config name is missing.\nPlease pick one")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    told = r"'openai/gsm8k' \(split 'train'; some need a subset, e.g. pool.subset=main\).*missing\.$"
    with pytest.raises(UsageError, match=told):
        load_pool("openai/gsm8k")


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_accelerate_reads_its_configs(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert config.distributed_type.value == kind and config.num_processes == 8 and config.mixed_precision == "no"
    if kind == "FSDP":
        known = {action.dest for action in accelerate_options()._actions}
        assert set(config.fsdp_config) <= known and config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


def accelerate_options():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def test_the_slurm_script_starts_a_launcher_per_machine(tmp_path):
    script = LAUNCH / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    programs = {"scontrol": 'echo "node-a"; echo "node-b"', "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
                "accelerate": 'printf "%q " "$@"; echo'}  # fmt: skip
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STAGE": "extract"}
    command = ["bash", script, "recipes/launch/llama-tulu.yaml", "budget=5%", "name=two words"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    for rank, line in enumerate(done.stdout.splitlines()):
        _, *words = shlex.split(line)
        told = accelerate_options().parse_args(words)
        assert (told.machine_rank, told.num_machines, told.num_processes, told.main_process_ip) == (rank, 2, 8, "node-a")
        assert told.module and told.training_script == "llmselect" and (ROOT / told.config_file).is_file()
        assert told.training_script_args == ["extract", "recipes/launch/llama-tulu.yaml", "budget=5%", "name=two words"]
    assert len(done.stdout.splitlines()) == 2


def test_processes_wait_for_the_first_longer_than_torch_would(monkeypatch):
    from types import SimpleNamespace

    made = []
    monkeypatch.setattr("accelerate.PartialState", lambda **settings: made.append(settings) or SimpleNamespace())
    _ = stages.Run(SimpleNamespace(folder=Path())).process  # type: ignore[arg-type]
    assert made[0]["timeout"].total_seconds() > 24 * 3600, "NCCL's default is ten minutes, a large pool takes longer to read"


def test_optimizer_states_are_not_kept_under_fsdp(tiny_model, tmp_path, monkeypatch):
    from llmselect.train import Train, finetune

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"train.checkpoints: .*ddp.yaml"):
        finetune([], str(tiny_model), tmp_path / "a", Train(checkpoints=2), seed=0)


SHARDED = """
import sys, torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from llmselect.token_trainer import gathered

model_path, out = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
lora = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), lora)
before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
assert gathered(model) is None
mesh = init_device_mesh("cpu", (2,))
for block in model.base_model.model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
part = next(p for p in model.parameters() if p.requires_grad)
assert part.to_local().numel() < before[next(iter(before))].numel()
whole = gathered(model)
assert set(whole) == set(before) and all(torch.equal(whole[name], before[name]) for name in before)
if dist.get_rank() == 0:
    model.save_pretrained(out, state_dict=whole)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), out)
    found = dict(again.named_parameters())
    assert all(torch.equal(found[name], before[name]) for name in before)
    print("same", len(before))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_an_adapter_sharded_by_fsdp_is_saved_whole(tiny_model, tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "sharded.py"), str(tiny_model), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("same "), done.stderr


@pytest.mark.slow
def test_two_processes_of_accelerate_run_a_recipe(rows, tiny_model, tmp_path):
    given = overrides("smollm2-dolly", rows, tiny_model, tmp_path / "run")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH / "ddp.yaml", "--num_processes", "2",
             "-m", "llmselect", "run", LAUNCH / "smollm2-dolly.yaml", *given, "train.tokens=200", "train.batch_tokens=100",
             "full=false"]  # fmt: skip
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| rds+ | 9 |" in done.stdout and done.stdout.count("report: ") == 1, "the first process alone prints"
