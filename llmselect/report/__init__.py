"""The report of a run: one HTML page without outside requests, on which the selections can be seen and searched.

It holds a map of the pool, held-out results, source mixes, scores and lengths, the overlap of the methods, what methods
tell about themselves, and the rows with why each was picked. Large pools are sampled: the page holds at most
`sample` rows, whatever the size of the pool.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmselect import atomic, config
from llmselect.errors import UsageError
from llmselect.recipe import Recipe
from llmselect.report.contents import contents
from llmselect.report.page import render
from llmselect.stages import Run

SAMPLE = 4000
NAME = "report.html"


def write_report(run: Run | Path | str, out: Path | str | None = None, sample: int = SAMPLE) -> Path:
    """Write the report of a run (or of the folder of one) to `out`, by default `report.html` in the folder.

    Args:
        sample: the most rows of the pool on the page; half of them go to the selections, in turns, best first.

    Returns: the file.

    Errors: `UsageError` for a folder that is no run or has no selections, and for a `sample` below 10.
    """
    if sample < 10:
        raise UsageError(f"sample: {sample} rows show nothing; give at least 10, e.g. --sample 4000")
    run = run if isinstance(run, Run) else open_run(Path(run))
    file = run.folder / NAME if out is None else Path(out)
    if file.is_dir():
        raise UsageError(f"out: {file} is a folder; give a file, e.g. --out {file / NAME}")
    atomic.write_text(file, render(contents(run, sample)))
    return file


def open_run(folder: Path) -> Run:
    """The run in `folder`, wherever the folder was moved. Errors: `UsageError` when it is not one."""
    for name in ("config.yaml", "rows.json"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} is not the folder of a run (no {name}); give one, e.g. runs/NAME")
    recipe = config.from_dict(Recipe, config.load_yaml(folder / "config.yaml"))
    return Run(replace(recipe, out=str(folder)))
