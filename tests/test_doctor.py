"""The doctor's findings against what the standard library says, and with packages missing, broken or too old."""

from __future__ import annotations

import importlib
import json
import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmselect import cli, cli_doctor, doctor, speed

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
SECRET = "hf_neverShownAnywhere"


@pytest.fixture
def quick(monkeypatch):
    """The measurements replaced by numbers; what they measure has a test of its own."""
    cpu = {
        "kind": "cpu",
        "name": "CPU",
        "memory": None,
        "memory_free": None,
        "bfloat16": None,
        "dtype": "float32",
        "gflops": 50.0,
    }
    monkeypatch.setattr(speed, "devices", lambda: [cpu])
    monkeypatch.setattr(speed, "write", lambda folder: {"mb_per_s": 200.0, "small_ms": 2.0, "error": None})


def lose(monkeypatch, **versions):
    """Pretend that these packages have another version, or none."""
    real = metadata.version
    versions = {name.lower(): one for name, one in versions.items()}  # installed metadata write names in lower case

    def version(name):
        if name.lower() in versions and versions[name.lower()] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name.lower()) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)


def test_what_it_tells_is_what_the_machine_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"https://me:{SECRET}@hub.example/path")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/blob").write_bytes(bytes(1234))
    done = CliRunner().invoke(cli.app, ["doctor", "--json", "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"] is True
    for one in found["packages"]:
        assert one["version"] == metadata.version(one["name"]) and one["ok"]
    runs = found["disks"]["runs"]
    usage = shutil.disk_usage(tmp_path)
    assert runs["total"] == usage.total and runs["free"] == pytest.approx(usage.free, rel=0.05)
    assert runs["measured_at"] == str(tmp_path), "the folder above one that is not there yet"
    assert found["disks"]["hub_cache"]["bytes"] == 1234
    assert found["settings"]["token"] is True and found["settings"]["hub"] == "hub.example"
    assert found["devices"][-1]["kind"] == "cpu" and 0.1 < found["devices"][-1]["gflops"] < 1e5
    assert found["write"]["mb_per_s"] > 0.1 and sorted(p.name for p in tmp_path.iterdir()) == ["cache"], "it leaves nothing"
    assert found["cpu"]["cores"] >= 1 and 1e8 < found["cpu"]["memory_free"] < 1e13
    assert SECRET not in done.stdout and SECRET not in cli_doctor.text(found)


def test_requirements_and_extras_are_those_of_pyproject(monkeypatch):
    assert set(doctor.EXTRAS) == set(PROJECT["optional-dependencies"])

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    required, extras = doctor.packages(doctor.requirements())
    name = lambda text: text.split(">")[0].split("[")[0]  # noqa: E731
    assert [one["name"] for one in required] == [name(one) for one in PROJECT["dependencies"]]
    for extra, stated in PROJECT["optional-dependencies"].items():
        assert [one["name"] for one in extras[extra]["packages"]] == [name(one) for one in stated]


def test_a_missing_extra_is_a_note_and_no_error(quick, monkeypatch, tmp_path):
    lose(monkeypatch, POT=None)
    found = doctor.diagnose(tmp_path)
    assert found["ok"] and found["extras"]["ot"]["installed"] is False and found["extras"]["cluster"]["installed"] is True
    (line,) = [one["text"] for one in found["advice"] if "llmselect[" in one["text"]]
    assert "ot" in line.split("[")[1].split("]")[0].split(",")
    assert "no   optimal transport: tarot, tarot_auto (missing: pot)" in cli_doctor.text(found).replace("POT", "pot")


@pytest.mark.parametrize(("version", "line"), [
    ("4.57.0", "transformers is 4.57.0; type: pip install 'transformers<6,>=5.9'"),
    (None, "transformers is not installed; type: pip install 'transformers<6,>=5.9'"),
])  # fmt: skip
def test_a_required_package_that_does_not_fit_is_an_error(quick, monkeypatch, tmp_path, version, line):
    lose(monkeypatch, transformers=version)
    done = CliRunner().invoke(cli.app, ["doctor", "--runs", str(tmp_path)])
    assert done.exit_code == 1 and f"error: {line}" in done.output and done.output.rstrip().endswith("see the errors above")


def test_a_broken_binary_is_named(quick, monkeypatch, tmp_path):
    real = importlib.import_module

    def broken(name, *rest):
        if name == "numba":
            raise OSError("libllvm.so:\n cannot open")
        return real(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = doctor.diagnose(tmp_path)
    assert not found["ok"] and found["broken_imports"] == ["numba: OSError: libllvm.so: cannot open"]


def test_machines_get_the_advice_they_need(quick, monkeypatch, tmp_path):
    found = doctor.diagnose(tmp_path)
    plain = {one["text"] for one in doctor.advice(found)}
    found["disks"]["runs"]["free"], found["cpu"]["threads"], found["cpu"]["cores"] = 1_000_000_000, 8, 2
    found["write"] = {"mb_per_s": 9.0, "small_ms": 80.0, "error": None}
    found["devices"].insert(0, {**found["devices"][0], "kind": "cuda", "name": "Old GPU", "bfloat16": False})
    new = " ".join(one["text"] for one in doctor.advice(found) if one["text"] not in plain and one["level"] == "warning")
    for words in ("1.0 GB free where runs lies", "OMP_NUM_THREADS=2", "9 MB/s", "Old GPU has no bfloat16"):
        assert words in new
    assert not any("no GPU" in one["text"] for one in doctor.advice(found))
    found["write"]["error"] = "Read-only file system"
    assert [one["level"] for one in doctor.advice(found) if "Read-only" in one["text"]] == ["error"]


def test_the_measurements_are_right(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    seconds = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(seconds)))
    assert speed.product("cpu", "float32", 10)["gflops"] == pytest.approx(2 * 10**3 / 1 / 1e9)
    assert speed.write(tmp_path) == {"mb_per_s": 16.0, "small_ms": 1000 / 8, "error": None} and not list(tmp_path.iterdir())
    assert speed.write(tmp_path / "absent") == {"mb_per_s": None, "small_ms": None, "error": "No such file or directory"}
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b").write_bytes(bytes(50))
    (tmp_path / "in/link").symlink_to(tmp_path / "a")
    link = (tmp_path / "in/link").lstat().st_size
    assert doctor.folder_bytes(tmp_path) == 150 + link, "a link is counted as a link"
