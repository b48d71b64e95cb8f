"""The command `llmselect doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmselect.cli_complete import Json
from llmselect.cli_help import MACHINE, examples


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(rich_help_panel=MACHINE, epilog=examples(
        "llmselect doctor",
        "llmselect doctor --runs /scratch/runs    # another disk",
        "llmselect doctor --json > machine.json   # for an issue: it holds no token",
    ))(doctor)  # fmt: skip


def doctor(runs: Annotated[Path, typer.Option(help="folder that runs go to")] = Path("runs"), as_json: Json = False) -> None:
    """Is this machine ready? Versions, extras, devices, disks, speed, and what to do.

    Exit code 1 if something required is broken. Takes some seconds, most of them to import torch.
    """
    from llmselect.doctor import diagnose

    found = diagnose(runs)
    typer.echo(json.dumps(found) if as_json else text(found))
    if not found["ok"]:
        raise typer.Exit(1)


def text(found: dict[str, Any]) -> str:
    """The diagnosis for a person."""
    lines = [f"llmselect {found['llmselect']}, Python {found['python']}, {found['platform']}", "", "Required packages"]
    lines += [f"  {one['name']:<16} {one['version'] or 'missing':<14}{'' if one['ok'] else ' needs ' + one['needs']}"
              for one in found["packages"]]  # fmt: skip
    lines += ["", "Extras"]
    for name, extra in found["extras"].items():
        missing = [one["name"] for one in extra["packages"] if not one["ok"]]
        lines.append(f"  {name:<10} {'yes' if extra['installed'] else 'no':<4} {extra['for']}"
                     + (f" (missing: {', '.join(missing)})" if missing else ""))  # fmt: skip
    lines += ["", "Devices", *_devices(found), "", "Disks"]
    for name, disk in found["disks"].items():
        used = f"{_size(disk['bytes'])} there, " if disk["bytes"] else ""
        lines.append(f"  {name.replace('_', ' '):<15} {disk['path']}: {used}{_size(disk['free'])} free of {_size(disk['total'])}")
    if not found["write"]["error"]:
        speed, wait = found["write"]["mb_per_s"], found["write"]["small_ms"]
        lines.append(f"  {'writing runs':<15} {speed:.0f} MB/s, {wait:.1f} ms for a small file, synced")
    told = found["settings"]
    lines += ["", "Settings", f"  Hub: {told['hub']}, {'offline' if told['offline'] else 'online'}, "
              f"token {'set' if told['token'] else 'not set'}"]  # fmt: skip
    lines += [f"  {name}={value}" for name, value in told["environment"].items()]
    lines += ["", "Advice", *([f"  {one['level']}: {one['text']}" for one in found["advice"]] or ["  none"])]
    return "\n".join([*lines, "", "ready" if found["ok"] else "not ready: see the errors above"])


def _devices(found: dict[str, Any]) -> list[str]:
    cpu, lines = found["cpu"], list[str]()
    for one in found["devices"]:
        if one["kind"] == "cpu":
            memory = f"{_size(cpu['memory'])} ({_size(cpu['memory_free'])} free)"
            about = f"{cpu['cores']} cores, {cpu['threads']} of them used, {memory}"
        else:
            free = f" ({_size(one['memory_free'])} free)" if one["memory_free"] is not None else ""
            about = f"{one['name']}, {_size(one['memory'])}{free}"
        lines.append(f"  {one['kind']:<5} {about}, {one['gflops']:,.0f} GFLOP/s in {one['dtype']}")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
