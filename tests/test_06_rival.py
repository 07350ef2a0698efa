"""The rival: where imagined paths begin, what the search does with scores, what an answer costs, two exams compared."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import lines, load, tiny_qwen25, write_questions
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

exam = load("06")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Two rooms with every frame of some trajectories, and D2 questions that state their motions."""
    run = tmp_path_factory.mktemp("rooms")
    sample, imagine = load("01"), load("02")
    sample.main(sample.Config(run=str(run), rooms=2, room_px=42, heldout=0.5))
    imagine.main(imagine.Config(run=str(run), keep="all", workers=1))
    (run / "student").mkdir()
    return run


def view_of(rooms, names: list[str]) -> dict:
    """The first trajectory with these actions."""
    return next(view for view in lines(rooms / "2_views/views.jsonl") if [name for name, _ in view["actions"]] == names)


def two_steps(rooms) -> dict:
    return next(view for view in lines(rooms / "2_views/views.jsonl") if len(view["actions"]) == 2)


def write_exam(rooms, views: list[dict]):
    """One D2 question a trajectory, about its first frame and its actions."""
    records = [{"task_type": "D2", "images": view["frames"][:1], "scene_id": view["scene_id"], "messages": [
        {"role": "user", "content": f"<image>Does it disappear after {exam.in_words(view['actions'])}? Answer yes or no."},
        {"role": "assistant", "content": ("yes", "no")[i % 2]}]} for i, view in enumerate(views)]
    (rooms / "3_qa").mkdir(exist_ok=True)
    (rooms / "3_qa/heldout.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@pytest.fixture
def quick(monkeypatch):
    """02 in this process instead of a new one, which takes seconds to begin."""
    def here(command, stdout, pass_fds):
        stage = load("02")
        monkeypatch.setattr(sys, "argv", command[1:] + ["--workers", "1"])
        stage.main(stage.parse(stage.Config))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(exam.subprocess, "run", here)


def sit(rooms, monkeypatch, says, **settings) -> tuple[dict, list[dict]]:
    """An exam whose student is `says(record) -> response`, the record as the student gets it; results and samples."""
    monkeypatch.setattr(exam, "load_student", lambda *args: None)
    monkeypatch.setattr(exam, "prepare", lambda student, batch, blank: [question["record"] for question in batch])
    monkeypatch.setattr(exam, "answer", lambda student, prompts, most: [(says(record), 2) for record in prompts])
    monkeypatch.setattr(exam, "spent", lambda *args: exam.NOTHING | {"tokens": 2, "vlm_flops": 10})
    usual = {"run": str(rooms), "checkpoint": "student", "blank": False, "batch": 2, "coupled": "simulator", "tag": "x"}
    cfg = exam.Config(**(usual | settings))
    shutil.rmtree(rooms / "6_eval" / cfg.tag, ignore_errors=True)
    exam.main(cfg)
    folder = rooms / "6_eval" / cfg.tag
    return json.loads((folder / "results.json").read_text()), lines(folder / "samples.jsonl")


def asked(record: dict) -> str:
    return record["messages"][0]["content"]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def test_a_walk_from_any_frame_goes_on_where_the_trajectory_did(rooms, quick):
    """From the key frame after the first action, the second action leads to the trajectory's last frame, to the pixel."""
    view = two_steps(rooms)
    middle, last = (str(rooms / view["frames"][view["keyframes"][k]]) for k in (1, 2))
    second = tuple(tuple(action) for action in view["actions"][1:])
    cfg = exam.Config(coupled="simulator")
    starts = {middle: exam.origin(exam.Path(middle), rooms)}
    seen, _ = exam.imagine(rooms / "onward", [(middle, second, 1)], starts, rooms, cfg)
    path, = seen[middle, second, 1]
    assert (pixels(path) == pixels(last)).all() and not (pixels(path) == pixels(middle)).all()
    shutil.rmtree(rooms / "onward")


def test_the_stated_motion_shows_the_true_outcome(rooms, monkeypatch, quick):
    views = lines(rooms / "2_views/views.jsonl")[:4]
    write_exam(rooms, views)
    seen = {}
    results, samples = sit(rooms, monkeypatch, lambda record: seen.setdefault(asked(record), record) and "no", coupled_stated=True)
    assert len(samples) == 4 and results["coupled"] | {"views": 4, "shown": 4, "questions_without": 0, "scorings": 0} == results["coupled"]
    for sample, view in zip(samples, views):
        (words, image), = sample["imagined"]
        assert words == exam.in_words(view["actions"]) and sample["cost"]["views"] == 1 and sample["cost"]["world_flops"] == 0
        assert (pixels(rooms / "6_eval/x" / image) == pixels(rooms / view["frames"][-1])).all()
    for text, record in seen.items():  # as the student got it: a mark for each picture, the motion named, the demand last
        assert text.count("<image>") == len(record["images"]) == 2 and "Imagined from image 1, after " in text
        assert text.endswith("Answer yes or no.")


def scorer(wanted: dict):
    """Answers `no`, and gives each imagined view whose words end like a key of `wanted` its (explore, helpful) scores, else 0."""
    def says(record):
        text = asked(record)
        if "Score each of" not in text:
            return "no"
        words = exam.re.findall("Imagined from image 1, after (.*?): <image>", text)
        which = 0 if "exploring" in text else 1
        return ", ".join(str(wanted.get(word, (0, 0))[which]) for word in words)
    return says


def test_search_follows_the_scores(rooms, monkeypatch, quick):
    write_exam(rooms, [view_of(rooms, ["turn_left"])])
    start = "turn left 20 degrees"
    wanted = {start: (9, 8), "turn left 10 degrees": (8, 7), "turn right 30 degrees": (7, 9),
              f"{start}; move forward 0.25 meters": (8, 8), "turn left 40 degrees": (3, 9)}
    texts = []
    says = scorer(wanted)
    results, (sample,) = sit(rooms, monkeypatch, lambda record: texts.append(asked(record)) or says(record))
    shown = [words for words, _ in sample["imagined"]]
    assert shown == ["turn right 30 degrees", start, "turn left 40 degrees", f"{start}; move forward 0.25 meters"]  # by step, best first
    tried = [exam.re.findall("after (.*?): <image>", text) for text in texts if "exploring" in text]
    assert len(tried) == 3 and len(tried[0]) in (6, 9)  # three sub-steps an action; forward may meet a wall
    assert {words.split("; ")[0].rsplit(" ", 2)[0] for words in tried[1]} <= {"turn left", "move forward"}  # no right after left
    assert {words for words in tried[1] if words.startswith(start)} and "turn left 50 degrees" in tried[1]
    assert all(words.startswith((start + "; move forward", )) for words in tried[2])  # the only view above 8 in the second step
    assert results["coupled"]["scorings"] == 6 and results["coupled"]["unparsable_scorings"] == 0
    assert sample["cost"]["tokens"] == 2 * 7 and sample["cost"]["vlm_flops"] == 70 and sample["cost"]["world_seconds"] > 0
    final = texts[-1]
    assert final.count("<image>") == 5 and final.index(start) < final.index("Does it disappear")


def test_scores_that_cannot_be_read_end_the_search(rooms, monkeypatch, quick):
    write_exam(rooms, [view_of(rooms, ["turn_left"])])
    results, (sample,) = sit(rooms, monkeypatch, lambda record: "no idea" if "Score each" in asked(record) else asked(record))
    assert sample["imagined"] == [] and results["coupled"]["unparsable_scorings"] == results["coupled"]["scorings"] == 2
    assert sample["response"] == sample["question"]  # the student gets the question as it was
    assert sorted(path.name for path in (rooms / "6_eval/x/imagined").iterdir()) == ["1"]


@pytest.mark.parametrize("text, count, scores", [
    ("3, 9, 0", 3, [3, 9, 0]), ("Output: 3,9,0.", 3, [3, 9, 0]), ("[3 9 0]", 3, [3, 9, 0]), ("7", 1, [7]), ("3, 9", 3, None),
    ("10, 3", 2, None), ("3, 9, 0 are my scores", 3, None), ("-3, 9", 2, None), ("", 1, None), ("3.5, 9", 2, None)])
def test_scores_of(text, count, scores):
    assert exam.scores_of(text, count) == scores


def test_stated():
    assert exam.stated("after turn left 40 degrees; move forward 1.2 meters?") == [("turn_left", 40.0), ("forward", 1.2)]
    assert exam.stated("Answer: move <direction> <number> meters or turn <direction> <number> degrees") == []
    assert exam.stated("move forward 99999999 meters") == [] and exam.stated("turn left 40 degrees; " * 1000) == []


def test_killed_search_goes_on(rooms, monkeypatch, quick):
    views = [view for view in lines(rooms / "2_views/views.jsonl") if len(view["actions"]) == 1][:5]
    write_exam(rooms, views)
    says, count = scorer({"turn left 20 degrees": (9, 9), "turn right 10 degrees": (8, 3), "turn left 30 degrees": (2, 8)}), 0

    def killed(record):
        nonlocal count
        count += 1
        if count in (9, 24):
            raise KeyboardInterrupt
        return says(record)

    def kept(results, samples):
        return {key: results[key] for key in results if key not in ("cost", "tag")}, [
            {key: sample[key] for key in sample if key != "cost"} for sample in samples]
    whole = kept(*sit(rooms, monkeypatch, says, search_steps=2))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sit(rooms, monkeypatch, killed, search_steps=2, tag="y")
    assert kept(*sit(rooms, monkeypatch, killed, search_steps=2, tag="y")) == whole


def test_scores_of_a_killed_search_go_to_their_questions_whatever_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(exam, "rate", lambda student, batch, cfg: [{"explore": [q["number"]], "helpful": [0], "cost": exam.NOTHING, "unparsable": 0} for q, _ in batch])
    questions, states = [{"number": n} for n in range(8)], [{"views": {"turn left 10 degrees": (None, "x.png")}}] * 8
    for batch in (4, 2, 8, 4):
        rated = exam.rate_all(questions, states, tmp_path, lambda: None, exam.Config(batch=batch))
        assert [one["explore"] for one in rated] == [[n] for n in range(8)]


def test_a_kill_behind_the_last_answer_does_not_pay_for_the_search_twice(rooms, monkeypatch, quick):
    write_exam(rooms, [view_of(rooms, ["turn_left"])])
    says = scorer({"turn left 20 degrees": (9, 9)})
    results, _ = sit(rooms, monkeypatch, says, search_steps=1)
    meta = rooms / "6_eval/x/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"finished": False}))  # samples.jsonl is whole, the kill came before the end
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    again, _ = sit(rooms, monkeypatch, says, search_steps=1)
    assert again["cost"] == results["cost"] and again["cost"]["views"] > 0


def test_a_video_is_cut_before_the_search_looks_at_its_first_frame(tmp_path, monkeypatch):
    def cut(video, folder, count):
        folder.mkdir(parents=True)
        Image.new("RGB", (56, 56)).save(folder / "000.png")
    seen = []
    monkeypatch.setattr(exam, "cut_frames", cut)
    monkeypatch.setattr(exam, "imagine", lambda sub, walks, *rest: seen.append(len(walks)) or ({walk: ["a.png"] * walk[2] for walk in walks}, 0.1))
    monkeypatch.setattr(exam, "rate_all", lambda questions, *rest: [{"explore": [0] * 9, "helpful": [0] * 9, "cost": exam.NOTHING, "unparsable": 0}])
    question = {"number": 0, "text": "Where?", "video": "v.mp4", "record": {"images": [str(tmp_path / "frames/000.png")], "messages": [
        {"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "A"}]}}
    exam.rival([question], None, tmp_path, tmp_path, exam.Config(coupled="warp", search_steps=1))
    assert seen == [3]


def test_photographs_are_warped(tmp_path, monkeypatch):
    """A photograph without depth can turn, not move; what it cannot is left out. With the real 02, as a process of its own."""
    (tmp_path / "student").mkdir()
    write_questions(tmp_path / "3_qa/heldout.jsonl", tmp_path, scenes=2, pictures=1, per_scene=1)
    results, samples = sit(tmp_path, monkeypatch, scorer({"turn left 10 degrees": (0, 9)}), coupled="warp",
                           coupled_args="--min_match 0.3 --workers 1")
    assert results["coupled"]["views"] == 12  # two photographs, left and right, three sub-steps
    for sample in samples:
        (_, image), = sample["imagined"]
        before, after = pixels(tmp_path / sample["images"][0]), pixels(tmp_path / "6_eval/x" / image)
        assert after.shape == before.shape  # 54 degrees across: after 10 to the left the old left edge stands right of where it was
        assert (after[:, :5] == after[0, 0]).all() and not (after[:, 30:] == after[0, 0]).all()


def test_a_fault_of_02_is_one_line(rooms, monkeypatch, capfd):
    write_exam(rooms, [view_of(rooms, ["turn_left"])])
    for settings, said in (({"coupled": "dream"}, "choose from simulator"), ({"search_scores": [8]}, "two numbers"),
                           ({"coupled": "", "coupled_stated": True}, "--coupled_stated needs")):
        with pytest.raises(SystemExit) as ended:
            sit(rooms, monkeypatch, scorer({}), **settings)
        err = capfd.readouterr().err
        assert ended.value.code == 2 and said in err and "Traceback" not in err
    path = rooms / view_of(rooms, ["turn_left"])["frames"][0]
    mark = path.parent / "view.json"
    whole = mark.read_text()
    mark.write_text(whole.replace('"start"', '"stop"'))
    with pytest.raises(SystemExit) as ended:
        exam.origin(path, rooms)
    mark.write_text(whole)
    assert ended.value.code == 2 and "view.json" in capfd.readouterr().err
    (broken := path.parent / "broken.png").write_text("no picture")
    assert exam.origin(broken, rooms) is None


@pytest.mark.parametrize("family", ["qwen3", "qwen25"])
def test_counted_operations_are_those_of_the_profiler(run, tmp_path, family):
    """One answer of 1 and of 6 tokens, two pictures of different sizes; torch counts what really ran."""
    student = (exam.load_student(str(run / "4_base"), torch.float32, "cpu", "eager", 10**6) if family == "qwen3"
               else tiny_qwen25(run, tmp_path, "eager"))
    images = []
    for k, size in enumerate(((112, 84), (168, 280))):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
        images.append(str(tmp_path / f"{k}.png"))
    record = {"images": images, "messages": [{"role": "user", "content": "<image><image>Which way did the camera turn?"},
                                             {"role": "assistant", "content": ""}]}
    prompt, = exam.prepare(student, [{"record": record}], False)
    for most in (1, 6):
        with FlopCounterMode(display=False) as counter:
            (_, generated), = exam.answer(student, [prompt], most)
        counted = exam.vlm_flops(student.model, len(prompt["ids"]), prompt["grids"], generated)
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.03), generated


def test_a_real_student_pays_for_its_search(run, tmp_path):
    """The shaken tiny student gives no scores: same answers as alone, at a higher price."""
    write_questions(run / "3_qa/heldout.jsonl", run, scenes=2, per_scene=1)
    for tag, coupled in (("alone", ""), ("coupled", "warp")):
        exam.main(exam.Config(run=str(run), checkpoint="4_base", tag=tag, max_new_tokens=4, device="cpu", coupled=coupled))
    alone, coupled = ({"samples": lines(run / "6_eval" / tag / "samples.jsonl"),
                       "cost": json.loads((run / "6_eval" / tag / "results.json").read_text())["cost"]} for tag in ("alone", "coupled"))
    assert [s["response"] for s in alone["samples"]] == [s["response"] for s in coupled["samples"]]
    assert coupled["cost"]["vlm_flops"] > 5 * alone["cost"]["vlm_flops"]
    assert coupled["cost"]["world_seconds"] > 0 == alone["cost"]["world_seconds"]
    for sample in coupled["samples"]:
        assert sample["cost"]["seconds"] > sample["cost"]["world_seconds"] and sample["cost"]["peak_gb"] > 0.1


def samples_of(right: list[bool], scenes: list[str], task: str = "D2") -> list[dict]:
    return [{"task_type": task, "scene_id": scene, "images": ["a.png"], "question": f"number {i}", "truth": "yes",
             "scores": {"answered": True, "accuracy": float(yes), "reward": 0.2 + 0.8 * yes}}
            for i, (yes, scene) in enumerate(zip(right, scenes))]


def test_compare(tmp_path, capsys):
    draw = np.random.default_rng(0)
    base, scenes = draw.random(300) < 0.4, [f"room {i // 3}" for i in range(300)]
    better = base | (draw.random(300) < 0.3)
    exams = {"base": samples_of(base, scenes), "better": samples_of(better, scenes)[:-20][::-1],  # 20 fewer, in another order
             "same": samples_of(base, scenes)}
    for name, samples in exams.items():
        (tmp_path / "6_eval" / name).mkdir(parents=True)
        (tmp_path / "6_eval" / name / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    found = {}
    for names in (["base", "better"], ["base", str(tmp_path / "6_eval/same")]):
        exam.main(exam.Config(run=str(tmp_path), compare=names))
        found[names[1]] = json.loads((tmp_path / "6_eval/compare.json").read_text())
    better_, same = found.values()
    row = better_["tasks"]["D2"]["accuracy"]
    gain = better[:-20].mean() - base[:-20].mean()
    assert (row["n"], better_["questions"], better_["only_a"], better_["only_b"]) == (280, 280, 20, 0)
    assert row["mean"] == pytest.approx(gain, abs=1e-6) and row["low"] < gain < row["high"] and 0 < row["low"] and row["p"] < 0.01
    apart = 1.96 * np.sqrt(base[:-20].var() / 280 + better[:-20].var() / 280)
    assert row["high"] - row["low"] < 1.6 * apart  # pairing takes out what both share: unpaired it would be 2 x apart
    assert same["tasks"]["all"]["right"] | {"mean": 0, "low": 0, "high": 0, "p": 1} == same["tasks"]["all"]["right"]
    assert "280 questions that both answered; left out: 20 only in base, 0 only in better" in capsys.readouterr().out
    for names in (["base"], ["base", "absent"]):
        with pytest.raises(SystemExit) as ended:
            exam.main(exam.Config(run=str(tmp_path), compare=names))
        assert ended.value.code == 2


def test_p_of_no_difference_is_rarely_small():
    """Under the null the p-value is below 0.1 about one time in ten."""
    draw, small = np.random.default_rng(1), 0
    for trial in range(200):
        values = draw.integers(0, 2, 60) - draw.integers(0, 2, 60).astype(float)
        small += exam.difference(values, [str(i) for i in range(60)], trial, draws=400)["p"] < 0.1
    assert 6 <= small <= 36
