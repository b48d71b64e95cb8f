"""Completion in a real bash, and `hf llmselect` through the real hf command."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llmselect import cli_complete, cli_extension
from llmselect.errors import LlmselectError, UsageError

ROOT = Path(__file__).parents[1]
ASK = """
eval "$(llmselect completion bash)"
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _llmselect_completion llmselect; echo "$*=${COMPREPLY[*]}"; }
complete -p llmselect
"""


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The executables of pyproject.toml in a folder on the path, as an installation makes them, and a home of their own."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, place in scripts.items():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))
        (folder / name).write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    return folder


def test_tab_in_a_real_bash(installed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.yaml").write_text("name: x\n")
    asked = ["sh", "show tr", "show trim --j", f"run {tmp_path}/m", "generate a b c --backend v", "sae d"]
    script = ASK + "".join(f"ask llmselect {words}\n" for words in asked)
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    registered, *answers = done.stdout.splitlines()
    assert registered == "complete -o default -F _llmselect_completion llmselect"
    found = dict(line.removeprefix("llmselect ").split("=") for line in answers)
    expected = ["show", "trajectory trim", "--json", f"{tmp_path}/mine", "vllm", "describe"]
    assert found == dict(zip(asked, expected, strict=True))


def test_scripts_of_all_shells(capsys):
    for shell in cli_complete.SHELLS:
        cli_complete.completion(shell)
        told = capsys.readouterr().out
        assert f"{cli_complete.VARIABLE}=complete_{shell}" in told and "llmselect" in told
    with pytest.raises(UsageError, match=r"no script for 'zhs'\. Did you mean 'zsh'"):
        cli_complete.completion("zhs")


def test_recipes_and_runs_are_found_and_folders_left_to_the_shell(tmp_path, monkeypatch):
    for name in ("demo/recipe.yaml", "done/config.yaml", "deep/er/recipe.yaml", "dry.yml", "data.json", ".dot/recipe.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert cli_complete.recipes("d") == ["demo", "dry.yml", "deep/", "done/"]
    assert cli_complete.recipes("deep/") == ["deep/er"] and cli_complete.recipes("de") == ["demo", "deep/"]
    assert cli_complete.recipes("dee") == [], "the shell itself then writes deep/ and no space"
    assert cli_complete.recipes("") == ["demo", "dry.yml", "deep/", "done/"], "what is hidden stays hidden"
    assert cli_complete.recipes(f"{tmp_path}/dem") == [f"{tmp_path}/demo"] and cli_complete.recipes("no/such/") == []
    assert cli_complete.runs("do") == ["done"]


def test_the_hf_command_starts_this_installation(installed, tmp_path):
    hf = shutil.which("hf")
    assert hf is not None
    started = cli_extension.register()
    assert started.name == "hf-llmselect" and os.access(started, os.X_OK)
    listed = subprocess.run([hf, "llmselect", "list", "--json"], capture_output=True, text=True, timeout=120)
    assert listed.returncode == 0 and "trim" in json.loads(listed.stdout)["extractor"], listed.stderr
    wrong = subprocess.run([hf, "llmselect", "show"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "Usage: hf llmselect show" in wrong.stderr, "its exit codes and names are passed on"
    manifest = json.loads((tmp_path / "home/.local/share/hf/extensions/hf-llmselect/manifest.json").read_text())
    assert manifest["short_name"] == "llmselect" and manifest["owner"].startswith("-"), "no account on GitHub begins so"
    with pytest.raises(UsageError, match="--force"):
        cli_extension.register()
    assert cli_extension.register(force=True) == started


def test_without_the_executable_it_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr(cli_extension.shutil, "which", lambda *a, **k: None)
    with pytest.raises(LlmselectError, match="pip install llmselect"):
        cli_extension.register()
