"""Would the tests notice? Plants one defect at a time in a copy of the package and runs the tests that should fail.

    python eval/mutation.py [--only WORD …] [--out eval/results/mutation.md]

A defect is a replacement of one piece of text in one file, so it must occur there exactly once. The tests have to pass on the
copy without a defect first. A defect that no test notices is a missing test. Exit status 1 if any survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
K, T = "llmselect/kernels/", "tests/test_"
ENDLESS = 1200


@dataclass(frozen=True)
class Defect:
    """`old` becomes `new` in `file`; `tests` are the files (or one test in a file) that should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str


DEFECTS = (
    Defect("ties go by row, not by id", K + "topk.py", "tied = tied[np.argsort(keys[tied], kind=\"stable\")][:",
           "tied = tied[:", "kernels"),
    Defect("the smallest instead of the largest", K + "topk.py", "if largest else", "if not largest else", "kernels"),
    Defect("a NaN is ranked", K + "topk.py", "if not finite.all():", "if False:", "kernels"),
    Defect("one row too few kept per column", K + "topk.py", "(self.keys[rows], -values))[: self.count]",
           "(self.keys[rows], -values))[: max(1, self.count - 1)]", "topk"),
    Defect("ties at the limit of a column cut by row", K + "topk.py",
           "tied[np.argsort(self.keys[rows[tied]], kind=\"stable\")]", "tied", "topk"),
    Defect("ties of targets dropped", K + "topk.py", "beats = block >= worst", "beats = block > worst", "kernels"),
    Defect("rows are not of unit length", K + "cosine.py", "return rows / np.sqrt(np.where(square > 0, square, 1))",
           "return rows", "kernels"),
    Defect("a zero target passes", K + "cosine.py", "| (np.abs(target).max(1, initial=0) == 0)", "| False", "kernels"),
    Defect("shares not capped by size", K + "groups.py", "out[group] = min(int(sizes[group]), rest // (len(order) - j))",
           "out[group] = rest // (len(order) - j)", "kernels"),
    Defect("a row taken twice in a draft", K + "groups.py", "            taken[row] = True\n", "", "kernels"),
    Defect("the smallest remainders first", K + "groups.py", "np.argsort(-(quota - more)", "np.argsort((quota - more)",
           "diversity"),
    Defect("queries do not rotate", K + "turns.py", "turn[g] += 1", "turn[g] += 0", "kernels"),
    Defect("draws do not depend on the seed", K + "keyed.py", "text = f\"{self.seed}/{stream}\"", "text = f\"{stream}\"",
           "kernels"),
    Defect("draws without the second mix", K + "keyed.py", "_mix(_mix(self.keys + np.uint64(0x9E3779B97F4A7C15)) ^",
           "_mix(self.keys ^", "kernels"),
    Defect("a fold without signs", K + "rows.py", "part[:, at] * self.signs[at]", "part[:, at]",
           "sketch::test_folded_rows_keep_products_of_rows_whose_numbers_have_one_sign"),
    Defect("a distance to the wrong centroid", K + "kmeans.py", "centroids[label[here]]", "centroids[label[here] - 1]",
           "diversity"),
    Defect("a row is its own neighbour", K + "neighbours.py", "own[~own.any(1), -1] = True", "own[:] = False; own[:, -1] = True",
           "diversity"),
    Defect("a list compared with the rows of another", K + "neighbours.py", "zip([0, *ends], ends, strict=False)",
           "zip(ends, [*ends[1:], 0], strict=False)", "neighbours"),
    Defect("a long list read in part", K + "neighbours.py", "range(self.start[one], self.start[one + 1], most)",
           "[self.start[one]]", "neighbours"),
    Defect("coverage of the sum, not the maximum", K + "objectives.py", "np.maximum(self.covered[theirs], cosine)",
           "self.covered[theirs] + cosine", "diversity"),
    Defect("an edge twice that both ends have", K + "graph.py", "kind[i, p] = OWN", "kind[i, p] = ONE_WAY", "knn_graph"),
    Defect("a set made with the draw of another", K + "cascade.py", "_mix(draws[which % n] +", "_mix(draws[last[n] % n] +",
           "cascade"),
    Defect("penalty with the wrong sign", K + "objectives.py", "self.total[rows] - self.penalty *",
           "self.total[rows] + self.penalty *",
           "diversity"),
    Defect("an inverse that is not updated", K + "objectives.py", "self.inverse -= np.outer", "self.inverse -= 0 * np.outer",
           "diversity"),
    Defect("a fall counted again", K + "objectives.py", "< seen[near, None]", "< 0", "diversity"),
    Defect("falls that bounds know taken again", K + "objectives.py", "recent = self.taken[self.refreshed : self.count]",
           "recent = self.taken[: self.count]", "refresh"),
    Defect("half precision with the bias of another", K + "half.py", "np.float32(2.0**112)", "np.float32(2.0**111)", "refresh"),
    Defect("a bound of the row before", K + "objectives.py", "best.astype(np.float64) + 2 * ROUNDING",
           "np.roll(best, 1).astype(np.float64) + 2 * ROUNDING", "refresh"),
    Defect("a bound without what is taken", K + "objectives.py", "slack - (rows @ narrow)", "slack + (rows @ narrow)", "refresh"),
    Defect("a bound without room for rounding", K + "objectives.py", "fall - 2 * ROUNDING", "fall + 2 * ROUNDING", "refresh"),
    Defect("a bound in the place of a gain", K + "greedy.py", "np.minimum(bound, _rounded(objective.refresh()))",
           "_rounded(objective.refresh())", "refresh"),
    Defect("rows looked at wait behind the others", K + "greedy.py", "            return heapq.heappop(self.back)",
           "            return heapq.heappop(self.back) if not self.next else self.next.pop()", "diversity"),
    Defect("a held row that is another's", K + "rows.py", "self.slot[before[before >= 0]] = -1",
           "self.slot[before[before >= 0]] += 0", "rows"),
    Defect("rows in the order of the pool", K + "rows.py", "stored = self.x[which]", "stored = self.x[np.sort(which)]", "rows"),
    Defect("a length lost in a long sum", K + "rows.py", "BLOCK, RUN = 8192, 1024", "BLOCK, RUN = 8192, 1 << 20", "refresh"),
    Defect("rows expected in the place of others expected", K + "rows.py", "other[here[here >= 0]] = False", "pass", "rows"),
    Defect("an edge that leads back", K + "graph.py", "source[at[j]], value[at[j]] = i,",
           "source[at[j]], value[at[j]] = j + first,", "knn_graph"),
    Defect("a drawn row drawn again", K + "greedy.py", "left[best] = left[count - 1]", "left[count - 1] = left[best]",
           "diversity"),
    Defect("of tied rows the first drawn", K + "greedy.py", "most[np.argmin(rng.keys[left[most]])]", "most[0]", "diversity"),
    Defect("equal rows tie by the order of the pool", "llmselect/selectors/set_functions.py",
           "by_key = np.argsort(rng.keys, kind=\"stable\")", "by_key = np.arange(len(rng.keys))", "knn_graph"),
    Defect("stale gains win", K + "greedy.py", "while (first := queue.first()) and fresh[first[2]] != len(order):",
           "while (first := queue.first()) and fresh[first[2]] < 0:",
           "diversity"),
    Defect("covariance without the mean", K + "whitening.py", "covariance = square / count - np.outer(shift, shift)",
           "covariance = square / count", "transport"),
    Defect("a ridge that is absolute", K + "whitening.py", "+= ridge * trace / d", "+= ridge", "transport"),
    Defect("a potential with the wrong sign", K + "transport.py", "f - f.mean(), g + f.mean()", "f.mean() - f, g + f.mean()",
           "transport"),
    Defect("minimum and maximum swapped", K + "jaccard.py", "value if value < theirs[g] else theirs[g]",
           "value if value > theirs[g] else theirs[g]", "sae::test_jaccard_laws"),
    Defect("a union without the prototype", K + "jaccard.py", "mass[:, None] + table.sum(0, dtype=np.float64) - overlap",
           "mass[:, None] - overlap", "sae::test_jaccard_laws"),
    Defect("noise with the wrong sign", K + "gumbel.py", "- np.log(-np.log(rng", "+ np.log(-np.log(rng", "dsir"),
    Defect("the hardest kept, the easiest dropped", K + "strata.py", "keys, largest=largest)", "keys, largest=not largest)",
           "ccs"),
    Defect("near copies kept", K + "filtering.py", "near[i + 1 :] = np.maximum(near[i + 1 :], inside[i, i + 1 :])", "pass",
           "diverse_baselines"),
    Defect("a residual that keeps its part", K + "pursuit.py", "rest = rest - basis[-1] * (basis[-1] @ rest)", "pass", "tagcos"),
    Defect("scattered rows come back in another order", "llmselect/arrays.py",
           "out[here] = self._shard(shard)[self.name][inside]",
           "out[np.sort(here)[::-1]] = self._shard(shard)[self.name][inside]", "arrays"),
    Defect("a damaged shard is read", "llmselect/store.py", 'or atomic.sha256_file(path) != self.about(shard)["sha256"]', "",
           "arrays"),
    Defect("a stale feature is reused", "llmselect/store.py", "self._refuse_other(name, self.open(name).spec, spec)", "pass",
           "arrays"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="words of the defects to plant")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    chosen = [d for d in DEFECTS if not a.only or any(word in d.what or word in d.file for word in a.only)]
    for one in chosen:
        planted(ROOT, one)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in ("llmselect", "tests", "eval/suites"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        sound: set[str] = set()
        lines = ["| defect | file | noticed by |", "|---|---|---|"]
        survived = 0
        for defect in chosen:
            if defect.tests not in sound and (failed := noticed(copy, defect.tests)):
                raise SystemExit(f"without any defect: {failed}")
            sound.add(defect.tests)
            found = plant(copy, defect)
            survived += not found
            lines.append(f"| {defect.what} | `{defect.file}` | {f'`{found}`' if found else '**nothing**'} |")
            print(lines[-1], flush=True)
            report(a.out, lines, survived)
    print(f"{len(chosen) - survived} of {len(chosen)} noticed")
    sys.exit(survived > 0)


def report(out: Path | None, lines: list[str], survived: int) -> None:
    """The table so far."""
    if out is not None:
        head = "# Planted defects\n\n```bash\npython eval/mutation.py --out eval/results/mutation.md\n```\n\n"
        told = f"{len(lines) - 2 - survived} of {len(lines) - 2} defects were noticed, each by the first test that failed.\n\n"
        out.write_text(head + told + "\n".join(lines) + "\n")


def plant(copy: Path, defect: Defect) -> str:
    """The first test that fails with the defect in place; the file is as before afterwards."""
    file, changed = copy / defect.file, planted(copy, defect)
    text = file.read_text()
    file.write_text(changed)
    try:
        return noticed(copy, defect.tests)
    finally:
        file.write_text(text)


def planted(folder: Path, defect: Defect) -> str:
    """The file's text with the defect in it. Errors: `SystemExit` when there is not exactly one place for it."""
    text = (folder / defect.file).read_text()
    if text.count(defect.old) != 1:
        raise SystemExit(f"{defect.what}: {defect.old!r} occurs {text.count(defect.old)} times in {defect.file}")
    return text.replace(defect.old, defect.new)


def noticed(copy: Path, tests: str) -> str:
    """The first test that fails, or nothing."""
    files = [f"{T}{name.replace('::', '.py::')}" + ("" if "::" in name else ".py") for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    # Its own cache of compiled functions, or those of an earlier defect would be taken.
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=ENDLESS)
    except subprocess.TimeoutExpired:  # hypothesis repeats a test that did not end
        return f"no end within {ENDLESS} s"
    if done.returncode not in (0, 1):
        return f"pytest ended with {done.returncode}" if done.returncode in (2, 3) else done.stdout[-500:]
    first = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    return first[1].split("[")[0] if first else ""


if __name__ == "__main__":
    main()
