"""The forks that README shows, tests/forks/*.patch, apply to the scripts as they stand, and run."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, lines, script

PATCHES = ROOT / "tests/forks"
SIZES = {"teacher": (30, ["02_imagine_views.py"]), "task": (15, ["03_build_qa.py"])}
SIZES |= {"dapo": (15, ["05_train_refine.py"])}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """A run of a few rooms after stage 2."""
    run = tmp_path_factory.mktemp("forks") / "run"
    script("01", "--run", run, "--recipe", "tiny", "--rooms", 12)
    script("02", "--run", run, "--recipe", "tiny")
    return run


def forked(name: str, folder):
    """A copy of the scripts with the patch `name` applied; returns how to run one of its stages."""
    for path in ROOT.glob("0[1-6]_*.py"):
        shutil.copy(path, folder / path.name)
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    patch = PATCHES / f"{name}.patch"
    subprocess.run(["git", "apply", "--unsafe-paths", patch], cwd=folder, check=True)

    def stage(number: str, *arguments):
        (path,) = folder.glob(f"{number}_*.py")
        script(path, *arguments)

    return stage


@pytest.mark.parametrize("name", SIZES)
def test_a_fork_is_small_and_in_one_file(name):
    text = (PATCHES / f"{name}.patch").read_text()
    changed = re.findall(r"^[+-](?![+-]{2} )", text, re.M)
    most, files = SIZES[name]
    assert re.findall(r"^\+\+\+ b/(.+)$", text, re.M) == files
    assert len(changed) <= most, f"{len(changed)} changed lines, at most {most}"


def test_another_teacher(views, tmp_path):
    stage = forked("teacher", tmp_path)
    run = tmp_path / "run"
    shutil.copytree(views / "1_trajectories", run / "1_trajectories")
    stage("02", "--run", run, "--recipe", "exact", "--teacher", "soft")
    records = lines(run / "2_views/views.jsonl")
    assert records and {record["teacher"] for record in records} == {"soft"}


def test_another_task(views, tmp_path):
    stage = forked("task", tmp_path)
    run = tmp_path / "run"
    shutil.copytree(views, run)
    stage("03", "--run", run, "--recipe", "tiny")
    asked = [
        question for question in lines(run / "3_qa/sft.jsonl") if question["task_type"] == "A5"
    ]
    assert asked and {question["answer_type"] for question in asked} == {"yes_no"}


def test_dapo(run, tmp_path):
    stage = forked("dapo", tmp_path)
    options = ["--recipe", "tiny", "--student", "4_base", "--out", "5_dapo", "--tasks", "A2"]
    stage("05", "--run", run, *options, "--steps", 2, "--prompts", 4)
    metrics = lines(run / "5_dapo/metrics.jsonl")
    assert len(metrics) == 2 and not any(line["kl"] for line in metrics)
    assert json.loads((run / "5_dapo/meta.json").read_text())["finished"]
