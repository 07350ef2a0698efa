"""The exam: scores by meaning, controls, intervals, bad input, resuming, the report. A stub answers unless a test says more."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, script
from PIL import Image

exam = load("06_eval")
ANSWERS = {"A1": ["move left 1 meters", "move forward 0.5 meters", "move right 1.5 meters"],
           "A2": ["turn left 30 degrees", "turn right 40 degrees", "turn right 90 degrees"],
           "A3": ["turn left 30 degrees; move left 1 meters", "move forward 1 meters; turn right 90 degrees"],
           "A4": ["true", "false"],
           "D1": ["[100, 100, 300, 300]", "[500, 200, 700, 800]"], "D2": ["yes", "no"],
           "D3": ["move left 1 meters", "turn left 30 degrees"],
           "D4": ["yes", "no"], "S1": ["[100, 100, 300, 300]"], "S2": ["yes", "no"], "S3": ["1 meters", "3.5 meters"],
           "S4": ["350 degrees", "20 degrees"], "S5": ["[100, 100, 300, 300]"], "S6": ["yes", "no"]}


def record(task: str, answer: str, scene: str, images: list[str], words: str = "") -> dict:
    text = "<image>" * len(images) + f"{task}: object at [100, 100, 300, 400]. {words}"
    return {"task_type": task, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
            "images": images, "scene_id": scene,
            "traj_id": "t000", "split": "heldout", "source": "simulated", "teacher": "simulator"}


def make_run(run: Path, rooms: int = 4) -> list[dict]:
    """A run with four pictures a room and a question of every task for each room and answer."""
    draw, records = np.random.default_rng(0), []
    for room in range(rooms):
        images = [f"2_views/room_{room}/t000/00{i}.png" for i in range(2)]
        for image in images:
            (run / image).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (84, 84, 3), dtype=np.uint8)).save(run / image)
        for task, answers in ANSWERS.items():
            shown = images[:1] if task in ("D2", "S1", "S2", "S3", "S4") else images
            records += [record(task, answer, f"room_{room}", shown, f"Case {i}.") for i, answer in enumerate(answers)]
    write(run / "3_qa" / "heldout.jsonl", records)
    write(run / "3_qa" / "sft.jsonl", [item | {"scene_id": "other"} for item in records])
    (run / "student").mkdir()
    return records


def write(path: Path, records: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in records))


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path)
    return tmp_path


def examine(run: Path, monkeypatch, says, spent=None, **settings) -> dict:
    """Run the exam with `says(question, blank) -> response` in place of a student, at the cost `spent`; its results."""
    monkeypatch.setattr(exam, "load_student", lambda *args: None)
    monkeypatch.setattr(exam, "prepare", lambda student, batch, blank: [(question, blank) for question in batch])
    monkeypatch.setattr(exam, "answer", lambda student, prompts, most: [(says(*prompt), 3) for prompt in prompts])
    monkeypatch.setattr(exam, "spent", spent or (lambda student, prompt, generated, seconds: exam.NOTHING | {"tokens": generated}))
    cfg = exam.Config(**({"run": str(run), "checkpoint": "student", "batch": 16} | settings))
    exam.main(cfg)
    return json.loads((run / "6_eval" / (cfg.tag or "student") / "results.json").read_text())


def truth(question, blank):
    return question["truth"]


def test_truth_scores_one_and_constants_and_blank_less(run, monkeypatch, capsys):
    results = examine(run, monkeypatch, lambda question, blank: "no" if blank else question["truth"])
    assert results["questions"] == len(make_run(run / "again")) and results["skipped"] == results["unparsable"] == 0
    for task, result in results["tasks"].items():
        for metric, values in result["metrics"].items():
            best = 0 if metric.startswith("error") else 1
            assert values["mean"] == values["low"] == values["high"] == best
            if len(ANSWERS[task]) > 1:
                assert values["constant"]["mean"] != best and values["blank"]["mean"] != best
    # box 1 copied: [100, 100, 300, 400] against the two true boxes, 40000 / 60000 and 0
    assert results["tasks"]["D1"]["metrics"]["iou"]["copy"]["mean"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)
    assert results["tasks"]["D1"]["metrics"]["iou"]["above_copy"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert results["mean_reward"]["mean"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {run / '6_eval' / 'student' / 'report.html'}" and "IoU of copying box 1" in "\n".join(lines)
    meta = json.loads((run / "6_eval" / "student" / "meta.json").read_text())
    assert meta["finished"] and meta["counts"]["answers"] == 2 * results["questions"]
    assert {path.name for path in (run / "6_eval" / "student").iterdir()} == {"samples.jsonl", "results.json", "report.html", "meta.json"}


@pytest.mark.parametrize("task, answer, response, expected", [
    ("A1", "move left 1 meters", "move left 1.5 meters", {"direction": 1, "error_m": 0.5}),
    ("A1", "move left 1 meters", "move right 1 meters", {"direction": 0, "error_m": 2}),
    ("A1", "move left 3 meters", "move forward 4 meters", {"direction": 0, "error_m": 5}),
    ("A1", "move left 3 meters", "turn left 4 degrees", {"direction": 0, "error_m": None}),
    ("A2", "turn left 30 degrees", "turn right 40 degrees", {"direction": 0, "error_deg": 70}),
    ("A2", "turn left 30 degrees", "turn left 40 degrees", {"direction": 1, "error_deg": 10}),
    ("A2", "turn left 30 degrees", "turn left 30 degrees, turn right 30 degrees",
     {"answered": False, "direction": 0, "reward": 0}),
    ("A3", "turn left 30 degrees; move left 1 meters", "Turn left 30.0 degrees, move left 1 meter.", {"exact": 1, "reward": 1}),
    ("A3", "turn left 30 degrees; move left 1 meters", "turn left 40 degrees; move left 1 meters",
     {"exact": 0, "answered": True}),
    ("A4", "true", "yes", {"accuracy": 1}), ("A4", "true", "maybe", {"accuracy": 0, "answered": False}),
    ("D1", "[0, 0, 100, 100]", "[50, 0, 150, 100]", {"iou": 1 / 3}),
    ("D1", "[0, 0, 100, 100]", "x" * 300, {"iou": 0, "reward": 0}),
    ("S3", "2 meters", "2.5 meters", {"error_m": 0.5}), ("S4", "350 degrees", "20 degrees", {"error_deg": 30}),
    ("S4", "0 degrees", "180 degrees", {"error_deg": 180}), ("D2", "no", "", {"answered": False, "accuracy": 0})])
def test_scores_by_meaning(task, answer, response, expected):
    got = exam.measure(task, answer, response)
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_left_right_swapped_student(run, monkeypatch):
    swap = {"left": "right", "right": "left", "yes": "no", "no": "yes", "true": "false", "false": "true"}
    results = examine(run, monkeypatch, lambda q, blank: re.sub(r"\w+", lambda word: swap.get(word[0], word[0]), q["truth"]))
    tasks = results["tasks"]
    assert tasks["A1"]["metrics"]["direction"]["mean"] == pytest.approx(1 / 3, abs=1e-6)  # forward stays forward
    assert tasks["A1"]["metrics"]["error_m"]["mean"] == pytest.approx((2 + 0 + 3) / 3, abs=1e-6)
    assert tasks["A2"]["metrics"]["error_deg"]["mean"] == pytest.approx((60 + 80 + 180) / 3, abs=1e-4)
    assert tasks["D2"]["metrics"]["accuracy"]["mean"] == tasks["A3"]["metrics"]["exact"]["mean"] == 0


def test_unparsable_answers_are_counted_and_get_the_worst_error(run, monkeypatch):
    results = examine(run, monkeypatch, lambda question, blank: "I can't tell")
    assert results["unparsable"] == results["questions"] and results["mean_reward"]["mean"] == 0
    # worst answers of the exam: left 1 -> right 1.5 (2.5); forward 0.5 -> right 1.5; right 1.5 -> left 1 (2.5)
    assert results["tasks"]["A1"]["metrics"]["error_m"]["mean"] == pytest.approx((2.5 + 2.5 ** 0.5 + 2.5) / 3, abs=1e-6)
    assert results["tasks"]["A2"]["metrics"]["error_deg"]["mean"] == pytest.approx((120 + 70 + 120) / 3, abs=1e-4)


def test_best_constant():
    truths = ["turn left 30 degrees"] * 3 + ["turn right 40 degrees"] * 2
    best = exam.best_constants("A2", truths, ["turn right 40 degrees", "turn left 30 degrees", "turn left 10 degrees"])
    assert best["direction"]["mean"] == 0.6 and best["direction"]["answer"].startswith("turn left")
    assert best["error_deg"] == {"mean": pytest.approx(28), "answer": "turn left 30 degrees"}  # 2 x 70 over 5; left 10: 32
    assert exam.best_constants("A2", truths, []) == {}


def test_interval():
    draw = np.random.default_rng(0)
    values = (draw.random(400) < 0.3).astype(float)
    alone = exam.interval(values, [f"room {i}" for i in range(400)], "A1")
    assert alone["low"] < alone["mean"] < alone["high"]
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 400), rel=0.15)
    alike = [f"room {i}" for i in np.repeat(np.arange(40), 10)]  # ten equal answers a room
    together = exam.interval(np.repeat(values[:40], 10), alike, "A1")
    assert together["high"] - together["low"] > 2.5 * (alone["high"] - alone["low"])
    assert exam.interval([1, 1, 1], ["a", "b", "c"]) == {"mean": 1, "low": 1, "high": 1}
    assert exam.interval([1, 0], ["a", "a"]) == {"mean": 0.5, "low": None, "high": None}
    assert exam.interval(values, ["room"] * 200 + ["hall"] * 200, 1) == exam.interval(values, ["room"] * 200 + ["hall"] * 200, 1)


def test_hostile_answers_are_shown_harmless(run, monkeypatch):
    hostile = ["<script>alert(1)</script>", "\u202eevil\u2066", "A" * 1_000_000, "</div></html><img src=x onerror=alert(1)>",
               "\ud800 \0 \x1b[2J",
               "&lt;b&gt; \"'`", "{{7*7}} ${x}", "[1, 2, 3, " + "9" * 150 + "]"]
    results = examine(run, monkeypatch, lambda question, blank: hostile[question["number"] % len(hostile)], blank=False)
    report = (run / "6_eval" / "student" / "report.html").read_bytes().decode()
    assert report.count("<script") == 1 and f"<script>{exam.SCRIPT}</script>" in report  # the page's own
    assert "onerror=alert(1)>" not in report and "\u202e" not in report and "\0" not in report
    assert "&lt;script&gt;" in report and "1,000,000 characters" in report and len(report) < 10_000_000
    assert "http" not in report.replace("http-equiv", "")  # one self-contained file
    assert results["tasks"]["A1"]["metrics"]["direction"]["mean"] == 0 and results["blank_mean_reward"] is None
    assert len((run / "6_eval" / "student" / "samples.jsonl").read_text().splitlines()) == results["questions"]


def test_questions_and_tags_cannot_inject(run, monkeypatch):
    evil = record("D4", "yes", "<b>room</b>", ["2_views/room_0/t000/000.png"] * 2, "<script></script> [5, 5, 9, 9]")
    write(run / "3_qa" / "heldout.jsonl", [evil])
    examine(run, monkeypatch, truth)
    report = (run / "6_eval" / "student" / "report.html").read_text()
    assert report.count("<script") == 1 and "<b>room" not in report
    for tag in ("../evil", "a/b", "..", "a b"):
        with pytest.raises(SystemExit) as ended:
            examine(run, monkeypatch, truth, tag=tag)
        assert ended.value.code == 2


def test_resumed_exam_writes_the_same_files(run, monkeypatch):
    def says(question, blank):
        return question["truth"] if (question["number"] + blank) % 3 else "no"

    def killed_at(count):
        def answers(question, blank):
            nonlocal count
            count -= 1
            if count < 0:
                raise KeyboardInterrupt
            return says(question, blank)
        return answers
    def written():
        samples = [json.loads(line) | {"cost": 0} for line in (folder / "samples.jsonl").read_text().splitlines()]
        return samples, *((folder / name).read_bytes() for name in ("results.json", "report.html"))
    examine(run, monkeypatch, says)
    folder = run / "6_eval" / "student"
    whole = written()
    shutil.rmtree(folder)
    for count in (0, 40, 65):
        with pytest.raises(KeyboardInterrupt):
            examine(run, monkeypatch, killed_at(count))
    log = folder / "samples.jsonl"
    kept = log.read_text()
    assert len(kept.splitlines()) >= 32 and not (folder / "results.json").exists()
    log.write_text(kept + kept.splitlines()[0][:20])  # what a kill may leave: half a line
    asked = []
    examine(run, monkeypatch, lambda question, blank: asked.append(question["number"]) or says(question, blank))
    assert written() == whole
    assert len(asked) == 2 * (len(whole[0]) - len(kept.splitlines()))  # what was answered is not asked again


def test_finished_exam_is_only_shown_and_other_settings_refused(run, monkeypatch, capsys):
    examine(run, monkeypatch, truth, tag="sft")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        examine(run, monkeypatch, None, tag="sft")
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "nothing to do" in out and out.splitlines()[-1].startswith("report: ")
    with pytest.raises(SystemExit) as ended:
        examine(run, monkeypatch, truth, tag="sft", per_task=3)
    assert ended.value.code == 2 and "per_task was 0, now 3" in capsys.readouterr().err


def test_beside_prints_one_table(run, monkeypatch, capsys):
    examine(run, monkeypatch, lambda question, blank: "no", tag="base")
    examine(run, monkeypatch, truth, tag="sft")
    capsys.readouterr()
    examine(run, monkeypatch, truth, tag="refined", beside=["base", "sft"])
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("task"))
    assert head.split() == ["task", "score", "n", "constant", "blank", "base", "sft", "refined"]
    table = lines[lines.index(head):]
    assert re.search(r"A2 +direction +12 +0\.667 +1\.000 +0\.000 ±0\.000 +1\.000 ±0\.000 +1\.000 ±0\.000", "\n".join(table))
    assert table[-1].startswith("report: ") and len({len(line) for line in table[1:-3]}) == 1  # aligned
    with pytest.raises(SystemExit) as ended:
        examine(run, monkeypatch, truth, tag="next", beside=["missing"])
    assert ended.value.code == 2


def test_bad_questions_are_named_counted_and_skipped(run, monkeypatch, capsys):
    good = record("D2", "yes", "room_0", ["2_views/room_0/t000/000.png"])
    bad = ['{"task_type": "D2", "mess', "[1, 2]", "\u00ff", "{}", good | {"task_type": "Z1"}, good | {"task_type": ["D2"]},
           good | {"messages": []}, good | {"messages": "text"}, good | {"messages": good["messages"][:1]},
           good | {"images": ["../secret.png"]},
           good | {"images": ["/etc/passwd"]}, good | {"images": ["absent.png"]}, good | {"images": []},
           good | {"images": "x.png"},
           good | {"images": [5]}, good | {"images": ["a\0b"]},
           good | {"messages": good["messages"][:1] + [{"role": "assistant", "content": "perhaps"}]},
           record("A1", "move left 1 meters; move left 2 meters", "room_0", good["images"]),
           record("D1", "[300, 300, 100, 100]", "room_0", good["images"]),
           record("D2", "yes", "r", good["images"], "long " * 5000), record("D2", "yes", "r", good["images"], "half a character \ud800")]
    write(run / "3_qa" / "heldout.jsonl", bad + [good, good | {"scene_id": "room_1"}])
    results = examine(run, monkeypatch, truth)
    assert results["questions"] == 2 and results["skipped"] == len(bad)
    assert len(capsys.readouterr().err.replace("\r", "\n").strip().split("heldout.jsonl:")) >= len(bad)
    write(run / "3_qa" / "heldout.jsonl", bad)
    with pytest.raises(SystemExit) as ended:
        examine(run, monkeypatch, truth, tag="none")
    assert ended.value.code == 2


def test_choice_of_questions_and_missing_files(run, monkeypatch, capsys):
    results = examine(run, monkeypatch, truth, per_task=2, tasks=["A1", "D1"], tag="few", train=["absent.jsonl"])
    assert {task: result["questions"] for task, result in results["tasks"].items()} == {"A1": 2, "D1": 2}
    assert results["tasks"]["A1"]["metrics"]["direction"]["constant"] is None and "absent.jsonl" in capsys.readouterr().err
    for settings in ({"questions": "absent.jsonl"}, {"tasks": ["Z1"]}, {"batch": 0}, {"checkpoint": "4_none"}):
        with pytest.raises(SystemExit) as ended:
            examine(run, monkeypatch, truth, tag="bad", **settings)
        assert ended.value.code == 2


def test_a_picture_that_comes_back_makes_it_another_exam(run):
    """Questions are counted as they load: with a picture missing later ones have other numbers, and recorded answers would go to the wrong ones."""
    cfg = exam.Config(run=str(run))
    picture, asked = run / "2_views/room_0/t000/000.png", lambda: exam.read_exam(cfg, {}, run)[3]
    whole, content = asked(), picture.read_bytes()
    picture.unlink()
    assert asked() != whole
    picture.write_bytes(content)
    assert asked() == whole


@pytest.mark.parametrize("settings", [["--device", "potato"], ["--device", "cuda"], ["--coupled", "warp", "--coupled_args", '"']])
def test_wrong_devices_and_arguments_are_one_line(settings):
    if settings[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    done = script("06", *settings, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and settings[-2] in done.stderr


def untrained_student(run):
    texts = [text for answers in ANSWERS.values() for text in answers]
    texts += ["A1 A2 A3 A4 D1 D2 D3 D4 S1 S2 S3 S4 S5 S6 : object at [100, 100, 300, 400]. Case 012."]
    load("04_train_sft").build_tiny(run / "student", texts, 0)


def test_drawn_answers_depend_on_the_question_and_the_seed_alone(run):
    """--temperature 1: the same draw in any batch, another with another seed; towards 0 the greedy answer."""
    untrained_student(run)
    settings, said = {"run": str(run), "checkpoint": "student", "max_new_tokens": 4, "device": "cpu", "blank": False, "per_task": 3}, {}
    for tag, more in {"drawn": {"temperature": 1.0}, "alone": {"temperature": 1.0, "batch": 1}, "other": {"temperature": 1.0, "seed": 1},
                      "cold": {"temperature": 1e-9}, "greedy": {}}.items():
        exam.main(exam.Config(**settings | more, tag=tag))
        said[tag] = {sample["number"]: sample["response"] for sample in map(json.loads, (run / "6_eval" / tag / "samples.jsonl").open())}
    unlike = {pair: sum(said[pair[0]][number] != said[pair[1]][number] for number in said["greedy"])
              for pair in (("drawn", "alone"), ("drawn", "other"), ("drawn", "greedy"), ("cold", "greedy"))}
    assert len(said["greedy"]) > 40 and unlike["drawn", "alone"] == 0 and min(unlike["drawn", "other"], unlike["drawn", "greedy"]) > 30, unlike
    assert unlike["cold", "greedy"] < 8  # without training some tokens tie exactly
    done = script("06", "--run", run, "--checkpoint", "student", "--temperature", -1, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--temperature at least 0" in done.stderr


def test_a_tiny_student_sits_the_exam(run):
    """The real model code, on a checkpoint without training: batches equal single questions, a broken picture is skipped."""
    untrained_student(run)
    picture = run / "2_views" / "room_3" / "t000" / "001.png"
    picture.write_bytes(picture.read_bytes()[:500])
    settings = {"run": str(run), "checkpoint": "student", "max_new_tokens": 6, "device": "cpu"}
    exam.main(exam.Config(**settings, tag="many", batch=64))
    exam.main(exam.Config(**settings, tag="one", batch=1, per_task=6))
    many, one = (json.loads((run / "6_eval" / tag / "results.json").read_text()) for tag in ("many", "one"))
    two_pictures = sum(len(ANSWERS[task]) for task in ("A1", "A2", "A3", "A4", "D1", "D3", "D4", "S5", "S6"))
    assert many["skipped"] == two_pictures and many["tasks"]["A1"]["skipped"] == 3 and many["tasks"]["S1"]["questions"] == 4
    said = {tag: [json.loads(line) for line in (run / "6_eval" / tag / "samples.jsonl").read_text().splitlines()]
            for tag in ("many", "one")}
    together = {sample["number"]: (sample["response"], sample["blank_response"]) for sample in said["many"]}
    assert all(together[sample["number"]] == (sample["response"], sample["blank_response"]) for sample in said["one"])
    assert one["questions"] > 40
    with pytest.raises(SystemExit) as ended:
        exam.main(exam.Config(**(settings | {"checkpoint": "3_qa"}), tag="none"))
    assert ended.value.code == 2
