"""The evaluation: scores by meaning, controls, intervals, bad input, resuming, the report.

A stub answers unless a test says more.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import load
from PIL import Image

from kernels import student as student_module
from kernels.student import check_picture

evaluation = load("06_eval")
ANSWERS = {
    "A1": ["move left 1 meters", "move forward 0.5 meters", "move right 1.5 meters"],
    "A2": ["turn left 30 degrees", "turn right 40 degrees", "turn right 90 degrees"],
    "A3": [
        "turn left 30 degrees; move left 1 meters",
        "move forward 1 meters; turn right 90 degrees",
    ],
    "A4": ["true", "false"],
    "D1": ["[100, 100, 300, 300]", "[500, 200, 700, 800]"],
    "D2": ["yes", "no"],
    "D3": ["move left 1 meters", "turn left 30 degrees"],
    "D4": ["yes", "no"],
    "S1": ["[100, 100, 300, 300]"],
    "S2": ["yes", "no"],
    "S3": ["1 meters", "3.5 meters"],
    "S5": ["[100, 100, 300, 300]"],
    "S6": ["yes", "no"],
    "E1": ["turn left 35 degrees", "turn right 10 degrees"],
    "E2": ["left", "nearer"],
}


def record(task: str, answer: str, scene: str, images: list[str], words: str = "") -> dict:
    text = "<image>" * len(images) + f"{task}: object at [100, 100, 300, 400]. {words}"
    return {
        "task_type": task,
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
        "images": images,
        "scene_id": scene,
        "traj_id": "t000",
        "split": "heldout",
        "source": "simulated",
        "teacher": "simulator",
    }


def make_run(run: Path, rooms: int = 4) -> list[dict]:
    """A run with four pictures a room and a question of every task for each room and answer."""
    draw, records = np.random.default_rng(0), []
    for room in range(rooms):
        images = [f"2_views/room_{room}/t000/00{i}.png" for i in range(2)]
        for image in images:
            (run / image).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (84, 84, 3), dtype=np.uint8)).save(run / image)
        for task, answers in ANSWERS.items():
            shown = images[:1] if task in ("D2", "S1", "S2", "S3", "E1", "E2") else images
            records += [
                record(task, answer, f"room_{room}", shown, f"Case {i}.")
                for i, answer in enumerate(answers)
            ]
    write(run / "3_qa" / "heldout.jsonl", records)
    (run / "student").mkdir()
    return records


def write(path: Path, records: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in records)
    )


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path)
    return tmp_path


def fake(monkeypatch, says, cost=None):
    """In place of a student: the response says(question, blank), at this cost."""
    real = evaluation.prompts_of
    student = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=lambda texts, **_: texts))

    def prompts_of(student, batch, blank):
        prompts = zip(batch, real(student, batch, blank), strict=True)
        return [p if "fault" in p else {"question": q, "blank": blank} for q, p in prompts]

    def generate(student, prompts, *_):
        return [says(prompt["question"], prompt["blank"]) for prompt in prompts]

    def open_pictures(student, paths, blank=False):
        return [evaluation.read_picture(path) for path in paths], None

    encoded = {"ids": [], "positions": np.zeros((3, 0)), "prompt": 0}
    cost = evaluation.NOTHING | (cost or {"tokens": 3, "seconds": 0.1})
    monkeypatch.setattr(evaluation, "load_for", lambda *_: student)
    monkeypatch.setattr(evaluation, "prompts_of", prompts_of)
    monkeypatch.setattr(evaluation, "generate", generate)
    monkeypatch.setattr(evaluation, "end_tokens", lambda _: [])
    monkeypatch.setattr(student_module, "open_pictures", open_pictures)
    monkeypatch.setattr(student_module, "encode_question", lambda *_: encoded)
    monkeypatch.setattr(evaluation, "spent", lambda *_: cost)


def evaluate(run: Path, monkeypatch, says, cost=None, **settings) -> dict:
    """Evaluate `says(question, blank) -> response`; the results, empty where others are missing."""
    with monkeypatch.context() as patch:
        fake(patch, says, cost)
        usual = {"run": str(run), "checkpoint": "student", "batch": 16, "tag": "student"}
        cfg = evaluation.Config(**(usual | settings))
        evaluation.main(cfg)
    path = run / "6_eval" / cfg.tag / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def truth(question, blank):
    return question["truth"]


def scores(results: dict, task: str, metric: str) -> dict:
    return results["tasks"][task]["metrics"][metric]


def test_truth_scores_one_and_constants_and_blank_less(run, monkeypatch, capsys):
    results = evaluate(run, monkeypatch, lambda q, blank: "no" if blank else q["truth"])
    assert results["questions"] == len(make_run(run / "again"))
    assert results["skipped"] == results["counts"]["unparsable"] == 0
    for task in ANSWERS:
        for metric, values in results["tasks"][task]["metrics"].items():
            best = 0 if metric.startswith("error") else 1
            assert values["mean"] == best
            assert (values["low"] if metric.startswith("error") else values["high"]) == best
            if len(ANSWERS[task]) > 1:
                assert values["constant"]["mean"] != best and values["blank"]["mean"] != best
    # box 1 copied: [100, 100, 300, 400] against the two true boxes, 40000 / 60000 and 0
    iou = scores(results, "D1", "iou")
    assert iou["copy"]["mean"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)
    assert iou["above_copy"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores(results, "all", "reward")["mean"] == results["right"]["mean"] == 1
    out, folder = capsys.readouterr().out, run / "6_eval/student"
    assert out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert re.search(r"D1 +IoU +8 +\S+ +0.000 +0.333 .* 1.000 \(\S+ to 1.000\)", out)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["finished"] and meta["counts"]["questions"] == results["questions"]
    files = {"samples.jsonl", "results.json", "report.html", "accuracy_cost.svg", "meta.json"}
    assert {path.name for path in folder.iterdir()} == files


TWO = "turn left 30 degrees; move left 1 meters"


@pytest.mark.parametrize(
    "kind, answer, response, expected",
    [
        ("motion", "move left 1 meters", "move left 1.5 meters", {"direction": 1, "error_m": 0.5}),
        ("motion", "move left 1 meters", "move right 1 meters", {"direction": 0, "error_m": 2}),
        ("motion", "move left 3 meters", "move forward 4 meters", {"direction": 0, "error_m": 5}),
        ("motion", "move left 3 meters", "turn left 4 degrees", {"error_m": None, "right": 0}),
        ("motion", "turn left 30 degrees", "turn right 40 degrees", {"error_deg": 70, "right": 0}),
        ("motion", "turn left 30 degrees", "turn left 40 degrees", {"error_deg": 10, "right": 1}),
        ("motion", "turn left 30 degrees", TWO, {"answered": False, "direction": 0, "reward": 0}),
        ("motions", TWO, "Turn left 30.0 degrees, move left 1 meter.", {"exact": 1, "reward": 1}),
        ("motions", TWO, TWO.replace("30", "40"), {"exact": 0, "answered": True, "right": 0}),
        ("yes_no", "true", "yes", {"accuracy": 1, "right": 1}),
        ("yes_no", "true", "maybe", {"accuracy": 0, "answered": False}),
        ("yes_no", "no", "", {"answered": False, "accuracy": 0}),
        ("choice", "B", "b.", {"answered": True, "accuracy": 1}),
        ("choice", "B", "A", {"answered": True, "accuracy": 0}),
        ("choice", "B", "A or B", {"answered": False, "accuracy": 0}),
        ("relation", "left", "Left.", {"accuracy": 1, "right": 1}),
        ("relation", "left", "left or right", {"answered": False, "accuracy": 0}),
        ("box", "[0, 0, 100, 100]", "[50, 0, 150, 100]", {"iou": 1 / 3, "right": 0}),
        ("box", "[0, 0, 100, 100]", "x" * 300, {"iou": 0, "reward": 0, "answered": False}),
        ("meters", "2 meters", "2.5 meters", {"error_m": 0.5, "right": 1}),
        ("degrees", "350 degrees", "20 degrees", {"error_deg": 30, "right": 0}),
        ("degrees", "0 degrees", "180 degrees", {"error_deg": 180}),
    ],
)
def test_scores_by_meaning(kind, answer, response, expected):
    got = evaluation.measure(kind, answer, response)
    assert {key: got[key] for key in expected} == pytest.approx(expected)


def test_choices_of_a_task_are_scored_beside_its_open_questions(run, monkeypatch):
    """As "A2 choice", with accuracy; a letter may be followed by the text of its option."""
    images, options = (
        ["2_views/room_0/t000/000.png"],
        ["turn left 40 degrees", "turn left 70 degrees"],
    )
    more = {"answer_type": "choice", "options": options}
    words = "A. turn left 40 degrees B. turn left 70 degrees"
    choices = [record("A2", answer, f"room_{answer}", images, words) | more for answer in "AB"]
    plain = record("A2", "turn left 40 degrees", "room_0", images)
    write(run / "3_qa/heldout.jsonl", [*choices, plain])

    def says(question, blank):
        return "B. turn left 70 degrees" if question["options"] else question["truth"]

    results = evaluate(run, monkeypatch, says, tasks=["A2"])
    assert {task: row["questions"] for task, row in results["tasks"].items()} == {
        "A2": 1,
        "A2 choice": 2,
        "all": 3,
    }
    accuracy = scores(results, "A2 choice", "accuracy")
    assert accuracy["mean"] == accuracy["first"]["mean"] == accuracy["last"]["mean"] == 0.5


def test_scores_go_by_the_answer_type_and_otherwise_by_the_task(run, monkeypatch):
    image = ["2_views/room_0/t000/000.png"]
    given = {"E1": ("motion", "turn left 30 degrees"), "E3": ("choice", "C"), "A2": (None, "no")}
    records = []
    for task, (kind, answer) in given.items():
        records.append(record(task, answer, "room_0", image) | {"answer_type": kind})
    records.append(record("A2", "turn left 30 degrees", "room_0", image) | {"answer_type": "??"})
    write(run / "3_qa/heldout.jsonl", records)
    results = evaluate(run, monkeypatch, truth)
    tasks = {"E1": "error_deg", "E3": "accuracy", "A2": "error_deg"}
    assert all(metric in results["tasks"][task]["metrics"] for task, metric in tasks.items())
    assert results["questions"] == 3 and results["counts"]["skipped, unusable row"] == 1


def test_left_right_swapped_student(run, monkeypatch):
    pairs = {"left": "right", "yes": "no", "true": "false"}
    swap = pairs | {b: a for a, b in pairs.items()}

    def says(question, blank):
        return re.sub(r"\w+", lambda word: swap.get(word[0], word[0]), question["truth"])

    results = evaluate(run, monkeypatch, says)
    want = {("A1", "direction"): 1 / 3, ("A1", "error_m"): 5 / 3, ("A2", "error_deg"): 320 / 3}
    want |= {("D2", "accuracy"): 0, ("A3", "exact"): 0}  # in A1 forward stays forward
    for (task, metric), mean in want.items():
        assert scores(results, task, metric)["mean"] == pytest.approx(mean, abs=1e-4)


def test_unparsable_answers_are_counted_and_get_the_worst_error(run, monkeypatch):
    results = evaluate(run, monkeypatch, lambda question, blank: "I can't tell")
    assert results["counts"]["unparsable"] == results["questions"]
    assert scores(results, "all", "reward")["mean"] == 0
    # the worst true answers: left 1 -> right 1.5 (2.5); forward 0.5 -> right 1.5; right 1.5 -> 2.5
    error_m, error_deg = scores(results, "A1", "error_m"), scores(results, "A2", "error_deg")
    assert error_m["mean"] == pytest.approx((2.5 + 2.5**0.5 + 2.5) / 3, abs=1e-6)
    assert error_deg["mean"] == pytest.approx((120 + 70 + 120) / 3, abs=1e-4)


def test_best_constant():
    truths = ["turn left 30 degrees"] * 3 + ["turn right 40 degrees"] * 2
    usual = {"answer_type": "motion", "question": "", "response": "", "blank_response": None}
    own = [usual | {"truth": truth} for truth in truths]
    best = evaluation.fill_scores(own, {})
    means = {m: np.mean([sample["constant_scores"][m] for sample in own]) for m in best}
    assert means["direction"] == 0.6 and best["direction"].startswith("turn left")
    assert means["error_deg"] == pytest.approx(28)  # 2 x 70 over 5; right 40: 3 x 70
    assert best["error_deg"] == "turn left 30 degrees"


def test_intervals_draw_whole_scenes():
    draw = np.random.default_rng(0)
    values, rooms = (draw.random(400) < 0.3).astype(float), [f"room {i}" for i in range(400)]
    alone = evaluation.estimate(values, rooms, "A1")
    assert alone["low"] < alone["mean"] < alone["high"]
    width = 2 * 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert alone["high"] - alone["low"] == pytest.approx(width, rel=0.15)
    alike = np.repeat(rooms[:40], 10)  # ten equal answers per room
    together = evaluation.estimate(np.repeat(values[:40], 10), alike, "A1")
    assert together["high"] - together["low"] > 2.5 * (alone["high"] - alone["low"])
    one = evaluation.estimate(np.array([1, 0]), ["a", "a"])
    assert one == {"mean": 0.5, "low": None, "high": None}
    assert evaluation.estimate(values, alike, 1) == evaluation.estimate(values, alike, 1)
    weighted = evaluation.estimate(np.array([1, 0, 0]), [*"abc"], weights=np.array([2, 1, 1]))
    assert weighted["mean"] == 0.5


def test_none_of_24_may_be_one_in_eight():
    """Draws of equal answers never differ: Wilson's interval says what is still possible."""
    none = evaluation.estimate(np.zeros(24), [f"room {i}" for i in range(24)])
    assert none["low"] == 0 and none["high"] == pytest.approx(0.138, abs=1e-3)
    every = evaluation.estimate(np.ones(24), [f"room {i}" for i in range(24)])
    assert every["high"] == 1 and every["low"] == pytest.approx(1 - 0.138, abs=1e-3)
    few = evaluation.estimate(np.array([1.0] + [0] * 29), [f"room {i}" for i in range(30)])
    assert few["high"] - few["mean"] > 2 * (few["mean"] - few["low"]) > 0  # asymmetric


@pytest.mark.parametrize("scenes", [8, 60])
def test_p_of_no_difference_is_rarely_small(scenes):
    """Under the null p is below 0.05 one time in twenty, with few scenes as with many."""
    draw, small = np.random.default_rng(1), 0
    names = [str(i) for i in range(scenes)] * 6
    for trial in range(400):
        room = draw.normal(size=scenes)  # what a room's questions have in common
        values = np.tile(room, 6) + draw.normal(size=6 * scenes)
        small += evaluation.estimate(values, names, trial, difference=True)["p"] < 0.05
    assert 8 <= small <= 32


def test_holm():
    """Four tests: the smallest counts four times, none less than one before it."""
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([0.9, 0.8]) == [1.0, 1.0] and evaluation.holm([]) == []


def test_hostile_answers_are_shown_harmless(run, monkeypatch):
    hostile = [
        "<script>alert(1)</script>",
        "\u202eevil\u2066",
        "A" * 1_000_000,
        "\ud800 \0 \x1b[2J",
    ]
    hostile += ["</div></html><img src=x onerror=alert(1)>", "&lt;b&gt; \"'`", "{{7*7}} ${x}"]
    hostile.append("[1, 2, 3, " + "9" * 150 + "]")

    def says(question, blank):
        return hostile[question["number"] % len(hostile)]

    results = evaluate(run, monkeypatch, says, pictures="shown")
    report = (run / "6_eval/student/report.html").read_bytes().decode()
    assert report.count("<script") == 1 and "onerror=alert(1)>" not in report
    assert "\u202e" not in report and "\0" not in report and "{{7*7}}" in report
    assert "&lt;script&gt;" in report and "1,000,000 characters" in report
    assert len(report) < 10_000_000
    assert "http" not in report.replace("http-equiv", "")  # one self-contained file
    assert scores(results, "A1", "direction")["mean"] == 0 and "blank" not in results["right"]
    samples = (run / "6_eval/student/samples.jsonl").read_text().splitlines()
    assert len(samples) == results["questions"]


def test_questions_and_tags_cannot_inject(run, monkeypatch):
    images, words = ["2_views/room_0/t000/000.png"] * 2, "<script></script> [5, 5, 9, 9]"
    write(run / "3_qa/heldout.jsonl", [record("D4", "yes", "<b>room</b>", images, words)])
    evaluate(run, monkeypatch, truth)
    report = (run / "6_eval/student/report.html").read_text()
    assert report.count("<script") == 1 and "<b>room" not in report
    for tag in ("../evil", "a/b", "..", "a b"):
        refused(run, monkeypatch, tag=tag)


def refused(run, monkeypatch, status: int = 2, **settings):
    with pytest.raises(SystemExit) as ended:
        evaluate(run, monkeypatch, truth, **settings)
    assert ended.value.code == status


def test_resumed_evaluation_writes_the_same_files(run, monkeypatch):
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
        names = ("samples.jsonl", "results.json", "report.html", "accuracy_cost.svg")
        return [(folder / name).read_bytes() for name in names]

    evaluate(run, monkeypatch, says)
    folder = run / "6_eval/student"
    whole = written()
    shutil.rmtree(folder)
    for count in (0, 40, 65):
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, monkeypatch, killed_at(count))
    log = folder / "samples.jsonl"
    kept = log.read_text()
    assert len(kept.splitlines()) >= 32 and not (folder / "results.json").exists()
    log.write_text(kept + kept.splitlines()[0][:20])  # what a kill may leave: half a line
    asked = []
    evaluate(run, monkeypatch, lambda q, blank: asked.append(q["number"]) or says(q, blank))
    assert written() == whole
    samples = whole[0].splitlines()  # what was answered is not asked again
    assert len(asked) == 2 * (len(samples) - len(kept.splitlines()))


def test_finished_evaluation_is_only_shown_and_other_settings_are_refused(run, monkeypatch, capsys):
    evaluate(run, monkeypatch, truth, tag="sft")
    capsys.readouterr()
    refused(run, monkeypatch, status=0, tag="sft")
    out = capsys.readouterr().out
    assert "nothing to do" in out and out.splitlines()[-1].startswith("report: ")
    refused(run, monkeypatch, tag="sft", temperature=1.0)
    assert "temperature was 0.0, now 1.0" in capsys.readouterr().err
    refused(run, monkeypatch, tag="sft", per_task=3)


def test_beside_prints_one_table(run, monkeypatch, capsys):
    evaluate(run, monkeypatch, lambda question, blank: "no", tag="base")
    evaluate(run, monkeypatch, truth, tag="sft", pictures="shown")
    capsys.readouterr()
    evaluate(run, monkeypatch, truth, tag="refined", beside=["base", "sft"])
    lines = capsys.readouterr().out.splitlines()
    assert not any("in another way" in line for line in lines)  # grey pictures are asked besides
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("task")) :]
    columns = "task score n constant blank copy base sft refined above blank"
    assert table[0].split() == columns.split()
    ends = r"\(\S+ to \S+\)"
    pattern = (
        rf"A2 +direction +12 +0\.667 .* +0\.000 {ends} +1\.000 {ends} +1\.000 {ends} +\+0\.000"
    )
    assert re.search(pattern, "\n".join(table))
    assert table[-1].startswith("report: ")
    with pytest.raises(FileNotFoundError):  # which `run` makes one line
        evaluate(run, monkeypatch, truth, tag="next", beside=["missing"])


def test_bad_questions_are_named_counted_and_skipped(run, monkeypatch, capsys):
    good = record("D2", "yes", "room_0", ["2_views/room_0/t000/000.png"])
    (asked, told), images = good["messages"], good["images"]
    bad = ['{"task_type": "D2", "mess', "[1, 2]", "\u00ff", "{}"]
    bad += [good | {"task_type": task} for task in ("Z1", ["D2"])]
    messages = [[], "text", [asked], [asked, told | {"content": "perhaps"}]]
    bad += [good | {"messages": one} for one in messages]
    paths = [["../secret.png"], ["/etc/passwd"], ["absent.png"], [], "x.png", [5], ["a\0b"]]
    bad += [good | {"images": one} for one in paths]
    bad.append(record("A1", "move left 1 meters; move left 2 meters", "room_0", images))
    bad.append(record("D1", "[300, 300, 100, 100]", "room_0", images))
    bad += [record("D2", "yes", "r", images, words) for words in ("long " * 9000, "half \ud800")]
    write(run / "3_qa/heldout.jsonl", [*bad, good, good | {"scene_id": "room_1"}])
    results = evaluate(run, monkeypatch, truth)
    assert results["questions"] == 2 and results["skipped"] == len(bad)
    named = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    lines = [line for line in named if ".jsonl:" in line]
    assert len(lines) + 5 == len(bad)  # five can be read, but not scored: they share a line
    assert len(named) == len(lines) + 2
    write(run / "3_qa/heldout.jsonl", bad)
    refused(run, monkeypatch, tag="none")


def test_choice_of_questions_and_missing_files(run, monkeypatch, capsys):
    few = {"per_task": 2, "tasks": ["A1", "D1"], "tag": "few"}
    results = evaluate(run, monkeypatch, truth, **few)
    counts = {task: result["questions"] for task, result in results["tasks"].items()}
    assert counts == {"A1": 2, "D1": 2, "all": 4}
    capsys.readouterr()
    wrong = [{"questions": "absent.jsonl"}, {"tasks": ["Z1"]}, {"batch": 0}]
    for settings in [*wrong, {"checkpoint": "4_none"}, {"shard": "2/2"}, {"temperature": -1.0}]:
        refused(run, monkeypatch, **({"tag": "bad"} | settings))
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_picture_that_comes_back_makes_it_another_evaluation(run, monkeypatch):
    """With a picture missing later questions have other numbers: recorded answers would go to them.

    (check_picture remembers, for the length of a process.)"""
    picture = run / "2_views/room_0/t000/000.png"
    content = picture.read_bytes()
    evaluate(run, monkeypatch, truth)
    picture.unlink()
    check_picture.cache_clear()
    refused(run, monkeypatch)
    picture.write_bytes(content)
    check_picture.cache_clear()
    refused(run, monkeypatch, status=0)


def untrained_student(run):
    texts = [text for answers in ANSWERS.values() for text in answers]
    texts.append("A1 A2 A3 A4 D1 D2 D3 D4 S1 S2 S3 S5 S6 E1 E2 : object at [100, 100, 300, 400].")
    load("04_train_sft").build_tiny(run / "student", [*texts, "Case 012."], 0)


def said_by(run, tag: str) -> dict:
    samples = map(json.loads, (run / "6_eval" / tag / "samples.jsonl").open())
    return {sample["number"]: (sample["response"], sample["blank_response"]) for sample in samples}


def test_drawn_answers_depend_on_the_question_and_the_seed_alone(run):
    """--temperature 1: the same draw in any batch, another with another seed; 0: the greedy one."""
    untrained_student(run)
    usual = {"run": str(run), "checkpoint": "student", "max_new_tokens": 4, "pictures": "shown"}
    drawn, said = {"temperature": 1.0}, {}
    ways = {"drawn": drawn, "alone": drawn | {"batch": 1}, "other": drawn | {"seed": 1}}
    for tag, more in (ways | {"cold": {"temperature": 1e-9}, "greedy": {}}).items():
        evaluation.main(evaluation.Config(**usual, **more, per_task=3, tag=tag))
        said[tag] = said_by(run, tag)

    def unlike(a, b):
        return sum(said[a][number] != said[b][number] for number in said["greedy"])

    assert len(said["greedy"]) > 40 and unlike("drawn", "alone") == 0
    assert min(unlike("drawn", "other"), unlike("drawn", "greedy")) > 30
    assert unlike("cold", "greedy") < 8  # without training some tokens tie exactly
    counts = json.loads((run / "6_eval/greedy/results.json").read_text())["counts"]
    samples = map(json.loads, (run / "6_eval/greedy/samples.jsonl").open())
    # nor does it end its answers
    assert counts["cut off at --max_new_tokens"] == sum(one["cut_off"] for one in samples) > 40


def test_a_tiny_student_is_evaluated(run):
    """The real model code, without training: batches equal single questions, a broken picture is
    skipped."""
    untrained_student(run)
    picture = run / "2_views/room_3/t000/001.png"
    picture.write_bytes(picture.read_bytes()[:500])
    usual = {"run": str(run), "checkpoint": "student", "max_new_tokens": 6}
    evaluation.main(evaluation.Config(**usual, tag="many", batch=64))
    evaluation.main(evaluation.Config(**usual, tag="one", batch=1, per_task=6))
    many = json.loads((run / "6_eval/many/results.json").read_text())
    about_two = ("A1", "A2", "A3", "A4", "D1", "D3", "D4", "S5", "S6")
    assert many["skipped"] == sum(len(ANSWERS[task]) for task in about_two)
    assert many["counts"]["skipped, unreadable picture"] == many["skipped"]
    assert many["tasks"]["A1"]["questions"] == 9 and many["tasks"]["S1"]["questions"] == 4
    together, one = said_by(run, "many"), said_by(run, "one")
    assert len(one) > 40 and all(together[number] == one[number] for number in one)
    with pytest.raises(SystemExit) as ended:
        evaluation.main(evaluation.Config(**(usual | {"checkpoint": "3_qa"}), tag="none"))
    assert ended.value.code == 2
