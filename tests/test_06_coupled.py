"""The test-time baseline: where imagined paths begin, what the search does with scores, what an
answer costs; and two evaluations compared."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import lines, load, tiny_qwen, write_questions
from PIL import Image
from test_06_eval import fake, write
from torch.utils.flop_counter import FlopCounterMode

from kernels.student import vlm_flops

evaluation = load("06")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Two rooms with every frame of some trajectories."""
    run = tmp_path_factory.mktemp("rooms")
    sample, imagine = load("01"), load("02")
    sample.main(sample.Config(run=str(run), rooms=2, room_px=42, heldout=0.5))
    imagine.main(imagine.Config(run=str(run), keep="all", workers=1))
    (run / "student").mkdir()
    return run


def views_of(rooms) -> list[dict]:
    return lines(rooms / "2_views/views.jsonl")


def one_turn(rooms) -> list[dict]:
    return [next(v for v in views_of(rooms) if [a[0] for a in v["actions"]] == ["turn_left"])]


def write_exam(rooms, views: list[dict]):
    """One D2 question per trajectory, about its first frame; it states the actions."""
    records = []
    for i, view in enumerate(views):
        words = evaluation.motion_text(view["actions"])
        text = f"<image>Does it disappear after {words}? Answer yes or no."
        turns = [("user", text), ("assistant", ("yes", "no")[i % 2])]
        messages = [{"role": role, "content": content} for role, content in turns]
        record = {"task_type": "D2", "images": view["frames"][:1], "scene_id": view["scene_id"]}
        records.append(record | {"messages": messages})
    write(rooms / "3_qa/heldout.jsonl", records)


@pytest.fixture
def quick(monkeypatch):
    """02 in this process instead of a new one, which takes seconds to begin."""

    def here(command, stdout):
        stage = load("02")
        monkeypatch.setattr(sys, "argv", command[1:] + ["--workers", "1"])
        stage.run(stage.main, stage.Config)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evaluation.subprocess, "run", here)


def take(rooms, monkeypatch, says, fresh=True, **settings) -> tuple[dict, list[dict]]:
    """A student that is `says(record) -> response`, the record as it gets it; results, samples."""
    usual = {"pictures": "shown", "batch": 2, "coupled": "simulator", "tag": "x"} | settings
    folder = rooms / "6_eval" / usual["tag"]
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    cost = {"tokens": 2, "vlm_flops": 10, "seconds": 0.1}
    with monkeypatch.context() as patch:
        fake(patch, lambda q, blank: says(q["record"]), cost)
        evaluation.main(evaluation.Config(run=str(rooms), checkpoint="student", **usual))
    return json.loads((folder / "results.json").read_text()), lines(folder / "samples.jsonl")


def asked(record: dict) -> str:
    return record["messages"][0]["content"]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def test_motions_as_poses_and_words():
    """After a turn right what was to the right is ahead; two equal actions in a row are one."""
    walk = (("turn_right", 30.0), ("turn_right", 60.0), ("forward", 0.5))
    walk = evaluation.merged(walk)
    assert evaluation.motion_text(walk) == "turn right 90 degrees; move forward 0.5 meters"
    poses, keyframes = evaluation.motion_poses(walk)
    assert keyframes == [0, 18, 21] and np.allclose(poses[0], np.eye(4))
    assert np.allclose(poses[-1][:3, 3], [0.5, 0, 0])
    left = evaluation.motion_pose("shift_left", 2.0) @ evaluation.motion_pose("backward", 1.0)
    assert np.allclose(left[:3, 3], [-2, 0, -1])


def test_a_walk_from_any_frame_goes_on_where_the_trajectory_did(rooms, quick):
    """From the key frame after the first action, the second leads to the last frame, but for the
    few pixels between two texels, where poses are rounded to 7 digits."""
    view = next(view for view in views_of(rooms) if len(view["actions"]) == 2)
    middle, last = (str(rooms / view["frames"][view["keyframes"][k]]) for k in (1, 2))
    one = (middle, (tuple(view["actions"][1]),))
    cfg = evaluation.Config(coupled="simulator")
    seen, _ = evaluation.draw_paths(rooms / "onward", [one], rooms, cfg)
    (path,) = seen[one]
    assert (pixels(path) != pixels(last)).mean() < 0.01
    assert (pixels(path) != pixels(middle)).mean() > 0.5
    shutil.rmtree(rooms / "onward")


def shown_in(text: str) -> list[str]:
    return re.findall("Imagined from image 1, after (.*?): <image>", text)


def scorer(wanted: dict):
    """Says `no`; gives each imagined view its (explore, helpful) scores of `wanted`, else 0."""

    def says(record):
        text = asked(record)
        if "Score each of" not in text:
            return "no"
        which = 0 if "exploring" in text else 1
        return ", ".join(str(wanted.get(words, (0, 0))[which]) for words in shown_in(text))

    return says


def test_search_follows_the_scores(rooms, monkeypatch, quick):
    write_exam(rooms, one_turn(rooms))
    start, texts = "turn left 18 degrees", []
    wanted = {start: (9, 8), "turn left 9 degrees": (8, 7), "turn right 27 degrees": (7, 9)}
    wanted |= {f"{start}; move forward 0.25 meters": (8, 8), "turn left 36 degrees": (3, 9)}
    says = scorer(wanted)

    def heard(record):
        texts.append(asked(record))
        return says(record)

    results, (sample,) = take(rooms, monkeypatch, heard)
    ways = ["turn right 27 degrees", start, "turn left 36 degrees"]  # of one way by amount
    assert [words for words, _ in sample["imagined"]] == [
        *ways,
        f"{start}; move forward 0.25 meters",
    ]
    tried = [shown_in(text) for text in texts if "exploring" in text]
    assert len(tried) == 3 and len(tried[0]) in (6, 9)  # three sub-steps; forward may meet a wall
    ways = {words.split("; ")[0].rsplit(" ", 2)[0] for words in tried[1]}
    assert ways <= {"turn left", "move forward"}  # no right after left
    assert {words for words in tried[1] if words.startswith(start)}
    assert "turn left 45 degrees" in tried[1]
    # the only view above 8 in the second step
    assert all(words.startswith(f"{start}; move forward") for words in tried[2])
    assert results["counts"]["scorings unparsable"] == 0
    cost = sample["cost"]
    assert cost["tokens"] == 2 * 7 and cost["vlm_flops"] == 70 and cost["world_seconds"] > 0
    final = texts[-1]
    assert final.count("<image>") == 5 and final.index(start) < final.index("Does it disappear")


def test_a_shared_path_is_paid_for_once(rooms, monkeypatch, quick):
    """Two questions about one picture: together they are charged what 02 took."""
    write_exam(rooms, one_turn(rooms) * 2)
    text = (rooms / "3_qa/heldout.jsonl").read_text().splitlines()
    write(rooms / "3_qa/heldout.jsonl", [text[0], text[1].replace("Does it", "Will it")])
    _, samples = take(rooms, monkeypatch, scorer({}))
    meta = json.loads((rooms / "6_eval/x/imagined/1/2_views/meta.json").read_text())
    charged = sum(sample["cost"]["world_seconds"] for sample in samples)
    assert len(samples) == 2 and charged == pytest.approx(meta["seconds"], abs=1e-3)


def test_scores_that_cannot_be_read_end_the_search(rooms, monkeypatch, quick):
    write_exam(rooms, one_turn(rooms))

    def says(record):
        return "no idea" if "Score each" in asked(record) else asked(record)

    results, (sample,) = take(rooms, monkeypatch, says)
    assert sample["imagined"] == [] and results["counts"]["scorings unparsable"] == 2
    assert sample["response"] == sample["question"]  # the student gets the question as it was
    assert evaluation.unreliable(results)
    assert "x (*)" in evaluation.table([results])[0]
    assert "this is no result" in evaluation.notes([results])[-2]
    assert [path.name for path in (rooms / "6_eval/x/imagined").iterdir()] == ["1"]


@pytest.mark.parametrize(
    "text, scores",
    [
        ("3, 9, 0", [3, 9, 0]),
        ("Output: 3,9,0", [3, 9, 0]),
        ("10, -3", [10, -3]),
        ("3, 9, 0 are my scores", None),
        ("[3, 9]", None),
        ("3.5, 9", None),
        ("", None),
    ],
)
def test_scores_are_read_as_published(text, scores):
    assert evaluation.scores_in(text) == scores


def test_lists_that_are_too_long_or_too_short_keep_their_scores():
    """The published code scores by place: a missing score is none, one too many meets no view."""
    views = {(("turn_left", 9.0 * i),): str(i) for i in (1, 2, 3)}
    for text, best in (("9, 8", [9.0, 18.0]), ("1, 2, 9, 9, 9", [27.0])):
        scores = evaluation.scores_in(text)
        walks = evaluation.best_of(views, scores)
        assert [walk[0][1] for walk in walks] == best and scores is not None


def test_killed_search_goes_on(rooms, monkeypatch, quick):
    write_exam(rooms, [view for view in views_of(rooms) if len(view["actions"]) == 1][:5])
    wanted = {"turn left 18 degrees": (9, 9), "turn right 9 degrees": (8, 3)}
    says, count = scorer(wanted | {"turn left 27 degrees": (2, 8)}), 0

    def killed(record):
        nonlocal count
        count += 1
        if count in (9, 24):
            raise KeyboardInterrupt
        return says(record)

    def kept(results, samples):
        return results["tasks"], [sample | {"cost": 0} for sample in samples]

    whole = kept(*take(rooms, monkeypatch, says))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            take(rooms, monkeypatch, killed, tag="y", fresh=False)
    asked_before = count
    assert kept(*take(rooms, monkeypatch, killed, tag="y", fresh=False)) == whole
    take(rooms, monkeypatch, killed, tag="z")
    assert count - asked_before < 2 * (count - asked_before) - 9  # some scores were kept


def test_a_kill_behind_the_last_answer_does_not_pay_for_the_search_twice(rooms, monkeypatch, quick):
    write_exam(rooms, one_turn(rooms))
    says = scorer({"turn left 18 degrees": (9, 9)})
    results, _ = take(rooms, monkeypatch, says)
    path = rooms / "6_eval/x/meta.json"  # samples.jsonl is whole, the kill came before the end
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    again, _ = take(rooms, monkeypatch, says, fresh=False)
    assert again["cost"] == results["cost"] and again["cost"]["views"] > 0


def test_a_video_is_cut_before_the_search_looks_at_its_first_frame(tmp_path, monkeypatch):
    def cut(video, folder, count):
        folder.mkdir(parents=True)
        Image.new("RGB", (56, 56)).save(folder / "000.png")

    tried = []

    def draw_paths(run, paths, *_):
        tried.append(len(paths))
        return {one: [] for one in paths}, 0.1

    monkeypatch.setattr(evaluation, "cut_frames", cut)
    monkeypatch.setattr(evaluation, "draw_paths", draw_paths)
    messages = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "A"}]
    record = {"images": [str(tmp_path / "frames/000.png")], "messages": messages}
    question = {"number": 0, "question": "Where?", "video": "v.mp4", "record": record}
    cfg = evaluation.Config(coupled="warp")
    evaluation.search_views([question | {"images": ["0"]}], None, tmp_path, tmp_path, cfg)
    assert tried[0] == 3 and not any(tried[1:])


def test_photographs_are_warped(tmp_path, monkeypatch):
    """A photograph without depth can turn, not move; what it cannot is left out. With the real
    02, as a process of its own."""
    (tmp_path / "student").mkdir()
    write_questions(tmp_path / "3_qa/heldout.jsonl", tmp_path, scenes=2, pictures=1, per_scene=1)
    says = scorer({"turn left 9 degrees": (0, 9)})
    _, samples = take(tmp_path, monkeypatch, says, coupled="warp --workers 1")
    for sample in samples:
        assert sample["cost"]["views"] == 6  # left and right, three sub-steps
        ((_, image),) = sample["imagined"]
        before = pixels(tmp_path / sample["images"][0])
        after = pixels(tmp_path / "6_eval/x" / image)
        assert after.shape == before.shape
        # 54 degrees across: after 9 to the left the old left edge stands right of where it was
        assert (after[:, :5] == after[0, 0]).all() and not (after[:, 30:] == after[0, 0]).all()


def test_stated_motions_become_static_questions(rooms, monkeypatch, quick):
    """A student that sees perfectly but knows no motion: of D2 it is told the true view, so that it
    is wrong only where another object has the label; D1 and D4 are S5 and S6 word for word."""
    build = load("03")
    cfg = build.Config(run=str(rooms), formats=["open"], caps=["D2=9", "D4=9"])
    views, _ = build.load_views(cfg, None)
    written = [build.as_record(q) for q in build.ask_all(views, build.Survey(cfg, views))]
    write(rooms / "3_qa/heldout.jsonl", written)
    ends = [(pixels(rooms / v["frames"][-1]), v["objects"][-1]) for v in views_of(rooms)]
    heard = []

    def says(record):
        text, images = asked(record), record["images"]
        heard.append((text, len(images)))
        if not (label := re.search("Is there any (.+) in the picture", text)):
            return "yes" if "yes or no" in text else "[100, 100, 300, 300]"
        shown = pixels(images[0])
        objects = next(here for end, here in ends if (end != shown).mean() < 0.01)
        return "Yes." if label[1] in [one["label"] for one in objects if one["box"]] else "no"

    results, samples = take(rooms, monkeypatch, says, coupled_stated=True)
    tasks = {sample["task_type"] for sample in samples}
    assert tasks == {"D1", "D2", "D4"} == results["tasks"].keys() - {"all"}
    kept = sum(record["task_type"] in tasks for record in written)
    assert results["counts"]["dropped, no static question"] == len(written) - kept
    assert results["counts"]["dropped, no view"] == kept - len(samples) == 0
    assert not [text for text, _ in heard if re.search("meters|degrees", text)]
    assert {images for text, images in heard if "in image 2" in text} == {2}
    for sample in samples:
        own, text, cost = sample["question"], sample["asked"], sample["cost"]
        sentence = re.search(r" [^.:]*: .*(meters|degrees)\.", own)[0]
        if sample["task_type"] == "D2":
            ((words, path),) = sample["imagined"]
            assert text.count("<image>") == 1 and (rooms / "6_eval/x" / path).is_file()
            assert all(action in sentence for action in words.split("; "))
            assert cost["views"] == words.count(";") + 1 and cost["world_seconds"] > 0
        else:
            assert text == own.replace(sentence, "") and sample["imagined"] == []
            assert cost["views"] == cost["world_seconds"] == 0
    d2 = [sample for sample in samples if sample["task_type"] == "D2"]
    wrong = [sample for sample in d2 if sample["response"] != sample["truth"]]
    assert len(d2) > 12 and len(wrong) < 0.3 * len(d2)
    assert all(sample["truth"] == "yes" for sample in wrong)  # a twin is still there


@pytest.mark.parametrize(
    "settings", [{"coupled": "warp", "shard": "0/2"}, {"coupled_stated": True}]
)
def test_a_search_is_not_shared_out_and_needs_a_teacher(tmp_path, capsys, settings):
    with pytest.raises(SystemExit) as ended:
        evaluation.main(evaluation.Config(run=str(tmp_path), **settings))
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_fault_of_02_is_one_line(rooms, monkeypatch, capfd):
    write_exam(rooms, one_turn(rooms))
    with pytest.raises(SystemExit) as ended:
        take(rooms, monkeypatch, scorer({}), coupled="dream")
    err = capfd.readouterr().err
    assert ended.value.code == 2 and "simulator" in err and "Traceback" not in err
    path = rooms / one_turn(rooms)[0]["frames"][0]
    mark = path.parent / "view.json"
    whole = mark.read_text()
    mark.write_text(whole.replace('"start"', '"stop"'))
    assert evaluation.origin(path) is None
    mark.write_text(whole)
    assert "nothing is imagined" in capfd.readouterr().err
    (broken := path.parent / "broken.png").write_text("no picture")
    assert evaluation.origin(broken) is None


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_counted_operations_are_those_of_the_profiler(run, tmp_path, family):
    """An answer of 1 and of 6 tokens, two pictures of different sizes; torch counts what ran."""
    if family == "qwen2.5":
        student = tiny_qwen(run, tmp_path, "eager", "qwen2.5")
    else:
        source = str(run / "4_base")
        student = evaluation.load_student(source, torch.float32, "cpu", "eager", 10**6)
    images = []
    for k, size in enumerate(((112, 84), (168, 280))):
        noise = np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)
        images.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(noise).save(images[-1])
    turns = [("user", "<image><image>Which way did the camera turn?"), ("assistant", "")]
    messages = [{"role": role, "content": content} for role, content in turns]
    question = {"record": {"images": images, "messages": messages}}
    (prompt,) = evaluation.prompts_of(student, [question], False)
    for most in (1, 6):
        with FlopCounterMode(display=False) as counter:
            (tokens,) = evaluation.generate(student, [prompt], most)
        n = len(prompt["ids"])
        counted = vlm_flops(student.model, n, prompt["grids"], len(tokens))
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.03), len(tokens)


def test_a_real_student_pays_for_its_search(run):
    """The shaken tiny student gives no scores: same answers as alone, at a higher price."""
    write_questions(run / "3_qa/heldout.jsonl", run, scenes=2, per_scene=1)
    usual, said, costs = {"run": str(run), "checkpoint": "4_base", "max_new_tokens": 4}, [], []
    for tag in ("alone", "coupled"):
        teacher = "warp" if tag == "coupled" else ""
        evaluation.main(evaluation.Config(**usual, tag=tag, coupled=teacher))
        samples = lines(run / "6_eval" / tag / "samples.jsonl")
        said.append([sample["response"] for sample in samples])
        costs.append(json.loads((run / "6_eval" / tag / "results.json").read_text())["cost"])
    alone, searched = costs
    assert said[0] == said[1] and searched["vlm_flops"] > 5 * alone["vlm_flops"]
    assert searched["world_seconds"] > 0 == alone["world_seconds"]
    for sample in samples:
        assert sample["cost"]["seconds"] > sample["cost"]["world_seconds"]
        assert sample["cost"]["peak_gb"] > 0.1


def samples_of(right, scenes: list[str]) -> list[dict]:
    samples = []
    for i, (yes, scene) in enumerate(zip(right, scenes, strict=True)):
        scores = {"accuracy": float(yes), "reward": 0.2 + 0.8 * yes, "right": float(yes)}
        sample = {"task_type": "D2", "scene_id": scene, "images": ["a.png"], "truth": "yes"}
        samples.append(sample | {"question": f"number {i}", "scores": scores})
    return samples


def test_compare(tmp_path, capsys):
    draw = np.random.default_rng(0)
    base, scenes = draw.random(300) < 0.4, [f"room {i // 3}" for i in range(300)]
    better = base | (draw.random(300) < 0.3)
    students = {"base": samples_of(base, scenes), "same": samples_of(base, scenes)}
    students["better"] = samples_of(better, scenes)[:-20][::-1]  # 20 fewer, in another order
    for name, samples in students.items():
        write(tmp_path / "6_eval" / name / "samples.jsonl", samples)

    def compare(*names):
        evaluation.main(evaluation.Config(run=str(tmp_path), compare=[*names]))
        a, b = (name.rsplit("/")[-1] for name in names)
        return json.loads((tmp_path / f"6_eval/compare_{a}_{b}.json").read_text())

    found = compare("base", "better")
    row = found["tasks"]["D2"]["accuracy"]["above_a"]
    gain = better[:-20].mean() - base[:-20].mean()
    assert (found["tasks"]["D2"]["n"], found["of"]) == (280, [300, 280])
    assert row["mean"] == pytest.approx(gain, abs=1e-6) and row["p"] < 0.01
    assert 0 < row["low"] < gain < row["high"]
    apart = 1.96 * np.sqrt(base[:-20].var() / 280 + better[:-20].var() / 280)
    assert row["high"] - row["low"] < 1.6 * apart  # unpaired it would be 2 x apart
    out = capsys.readouterr().out
    assert "280 questions that both answered, of [300, 280]" in out
    same = compare("base", str(tmp_path / "6_eval/same"))["tasks"]["all"]["right"]["above_a"]
    assert same == {"mean": 0, "low": 0, "high": 0, "p": 1}
    assert found["tasks"]["D2"]["accuracy"]["above_a"]["holm"] < 0.01
    assert "right" not in found["tasks"]["D2"]  # its score once more would count as a test
    assert len(list((tmp_path / "6_eval").glob("compare_*.json"))) == 2  # one per pair
    for names in (["base"], ["base", "absent"]):
        with pytest.raises(SystemExit) as ended:
            compare(*names)
        assert ended.value.code == 2
