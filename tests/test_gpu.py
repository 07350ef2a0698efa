"""`make gpu` on small shapes on the CPU: every part runs, and what befalls one costs no other."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, script
from gpu import measure, parts

pytest.importorskip("triton", reason="triton is published for Linux only")
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there `make gpu` itself runs")
AUTHORS = """
from kernels.seva import Seva as Ours, SevaConfig as SevaParams
class Seva(Ours):
    pass
"""
FIGURES = {  # of each part: how many measurements, and one of them with values that it must have
    "tests": (1, "rays", {"passed", "failed"}),
    "bench": (15, "rays SVC", {"ours_ms", "eager torch / ours"}),
    "sft": (7, "the same, not shared", {"step_s", "tokens_s", "mfu", "peak_gb"}),
    "grpo": (2, "4 x 4", {"reading_s", "rollout_s", "update_s"}),
    "svc": (3, "ours over its authors'", {"times", "networks_differ_by"}),
    "backward": (4, "prefix 2560 + 8 x 64", {"ours_ms", "flex_attention / ours"}),
    "compiled": (1, "ours, compiled, 3 frames, 4 steps", {"call_s", "peak_gb"}),
}


def checkout(folder, text: str) -> str:
    """A folder as --seva wants it."""
    (folder / "seva").mkdir()
    (folder / "seva/model.py").write_text(text)
    return str(folder)


def begun(file, part: str):
    report = {"card": "tiny", "parts": {part: {"state": "done", "measurements": []}}}
    measure.save(file, report)
    return file


def command(*arguments, **variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment}
    return subprocess.run([*map(str, arguments)], **options)


@on_the_cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", measure.PARTS)
def test_every_part(part, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda **_: None)  # conftest has done it
    monkeypatch.setattr(sys, "path", [*sys.path])
    authors = checkout(tmp_path, AUTHORS)
    file = begun(tmp_path / "figures.json", part)
    parts.main(part, str(file), "tiny", authors)
    report = json.loads(file.read_text())
    found = report["parts"][part]["measurements"]
    number, what, names = FIGURES[part]
    assert len(found) == number
    [one] = [line for line in found if line["what"] == what]
    assert set(one["values"]) >= names
    for line in found:
        assert set(line["targets"]) <= set(line["values"])
        for name, value in line["values"].items():
            assert name == "mfu" or value >= 0, (line["what"], name, value)
    if part == "tests":
        assert one["values"] == {"passed": 1, "failed": 0}
    assert all(f"| {part} | {line['what']} |" in measure.table(report) for line in found)


@on_the_cpu
def test_a_part_that_dies_costs_no_other_its_figures(tmp_path):
    """The authors' network kills the process, after ours was measured; the next part still runs."""
    authors = checkout(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["svc", "backward", "--tiny", "--out", tmp_path]
    done = script("tests/gpu/measure", *arguments, "--seva", authors, env=env)
    found = json.loads((tmp_path / "gpu_tiny.json").read_text())["parts"]
    assert found["svc"]["state"] == "ended with status -9"
    assert [line["what"] for line in found["svc"]["measurements"]] == ["ours, 3 frames, 4 steps"]
    assert found["backward"]["state"] == "done" and len(found["backward"]["measurements"]) == 4
    assert "| svc | ended with status -9 |" in done.stdout
    # named parts are added to the file; a part for which no time is left says so
    done = script("tests/gpu/measure", "svc", *arguments[2:], "--seconds", 1)
    found = json.loads((tmp_path / "gpu_tiny.json").read_text())["parts"]
    assert found["svc"]["state"].startswith("left out") and found["backward"]["state"] == "done"
    assert "| svc | left out" in done.stdout


def test_a_part_that_raises_says_why(tmp_path, monkeypatch):
    def fails(run):
        run.add("before", {"ours_ms": 1.0})
        raise torch.OutOfMemoryError("of 80 GB\nnothing is left")

    file = begun(tmp_path / "figures.json", "sft")
    monkeypatch.setitem(parts.PARTS, "sft", fails)
    with pytest.raises(torch.OutOfMemoryError):
        parts.main("sft", str(file), "tiny")
    before, failed = json.loads(file.read_text())["parts"]["sft"]["measurements"]
    assert before["values"] == {"ours_ms": 1.0}
    assert failed["values"]["why"] == "OutOfMemoryError: of 80 GB nothing is left"


def test_a_part_that_hangs_is_stopped(tmp_path, monkeypatch):
    started, real = [], subprocess.Popen

    def popen(*arguments, **options):
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    file = begun(tmp_path / "figures.json", "sft")
    state = measure.run_part("sft", file, True, "", 0.2)
    assert state == "stopped after 0 s" and started[0].returncode == -9


def test_a_contestant_that_fails_costs_its_own_figure_only(tmp_path, monkeypatch):
    def broken(name, *arguments):
        if name == "SDPA":
            raise RuntimeError("no kernel")
        return 2.0

    monkeypatch.setattr(parts, "time_ms", broken)
    monkeypatch.setattr(parts.bench, "OPERATIONS", parts.bench.OPERATIONS[:1])
    file = begun(tmp_path / "figures.json", "bench")
    parts.main("bench", str(file), "tiny")
    [line] = json.loads(file.read_text())["parts"]["bench"]["measurements"]
    assert line["values"] == {"ours_ms": 2.0, "SDPA / ours": "failed, RuntimeError: no kernel"}


def test_targets_are_judged():
    assert measure.verdict(0.36, ">= 0.35", "NVIDIA H200") == "met"
    assert measure.verdict(18.1, "<= 18", "NVIDIA H200") == "not met"
    assert measure.verdict("unknown for this card", ">= 0.35", "another") == "not measured"
    assert measure.verdict(0.36, ">= 0.35", "tiny") == "not measured"


def test_without_a_gpu_it_says_so_in_one_line():
    done = command(
        "make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", CUDA_VISIBLE_DEVICES=""
    )
    [line] = done.stdout.splitlines()
    assert done.returncode == 0 and line.startswith("no GPU for ") and not done.stderr


def test_wrong_arguments_are_named():
    unknown = script("tests/gpu/measure", "sfd", check=False)
    assert unknown.returncode == 2 and "no part is named sfd: want tests, bench" in unknown.stderr
    nothing = script("tests/gpu/measure", "--seva", "tests", check=False)
    assert nothing.returncode == 2 and "--seva tests: holds no seva/model.py" in nothing.stderr
