"""Stage 3 by its promises, on made-up views: projected here by a pinhole camera that shares no code with the script."""
import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "03_build_qa.py"
spec = importlib.util.spec_from_file_location("build_qa", SCRIPT)
qa = sys.modules["build_qa"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(qa)

NUMBER = r"\d+(\.\d+)?"
ACTION = rf"(move (forward|backward|left|right) {NUMBER} meters|turn (left|right) {NUMBER} degrees)"
BOX = r"\[\d+, \d+, \d+, \d+\]"
GRAMMAR = {"A1": rf"move (forward|backward|left|right) {NUMBER} meters", "A2": rf"turn (left|right) {NUMBER} degrees",
           "A3": rf"{ACTION}; {ACTION}(; {ACTION})?", "A4": "true|false", "D1": BOX, "D2": "yes|no",
           "D3": rf"{ACTION}(; {ACTION})?", "D4": "yes|no", "S1": BOX, "S2": "yes|no", "S3": rf"{NUMBER} meters",
           "S4": r"\d+ degrees", "S5": BOX, "S6": "yes|no"}
ALL = sorted(GRAMMAR)
EIGHT = [task for task in ALL if task[0] != "S"]


# ---- the made-up views ---------------------------------------------------------------------------------------------------------

def walk(actions, start=(0, 0, 0)):
    """4x4 camera poses at the keyframes, by matrix products (the script uses angles)."""
    x, z, yaw = start
    poses = [rotation(yaw)]
    poses[0][:3, 3] = x, 0, z
    for name, value in actions:
        step = np.eye(4)
        if name.startswith("turn"):
            step = rotation(value if name == "turn_right" else -value)
        else:
            step[:3, 3] = {"forward": (0, 0, 1), "backward": (0, 0, -1), "shift_right": (1, 0, 0), "shift_left": (-1, 0, 0)}[name]
            step[:3, 3] *= value
        poses.append(poses[-1] @ step)
    return poses


def rotation(deg):
    c, s = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]])


def project(thing, c2w):
    """An object entry of a frame, or None when it is out of sight. 90 degrees field of view, square picture."""
    corners = np.array(list(itertools.product((-1, 1), repeat=3))) * thing["size"] / 2 + thing["at"]
    seen = (np.c_[corners, np.ones(8)] @ np.linalg.inv(c2w).T)[:, :3]
    if (seen[:, 2] < 0.1).any():
        return None
    xy = seen[:, :2] / seen[:, 2:] * 500 + 500
    box = np.rint(np.clip([*xy.min(0), *xy.max(0)], 0, 1000)).astype(int).tolist()
    if box[2] - box[0] < 5 or box[3] - box[1] < 5:
        return None
    return {"id": thing["id"], "label": thing["label"], "box": box, "visible_px": (box[2] - box[0]) * (box[3] - box[1]) // 100,
            "distance_m": round(float(np.hypot(*(np.array(thing["at"]) - c2w[:3, 3])[[0, 2]])), 3)}


def some_actions(g):
    move = lambda: (str(g.choice(["forward", "backward", "shift_left", "shift_right"])), round(int(g.integers(2, 21)) / 10, 1))
    turn = lambda: (str(g.choice(["turn_left", "turn_right"])), int(g.integers(1, 9)) * 10)
    kind = g.integers(6)
    return [[move()], [turn()], [turn(), move()], [move(), turn()], [turn(), move(), turn()], [move(), turn(), move()]][kind]


def fake_views(rooms=60, each=6, seed=0, sources=("simulated",)):
    colours, shapes, g, views = ["red", "green", "blue"], ["ball", "crate"], np.random.default_rng(seed), []
    for room in range(rooms):
        things = [{"id": i, "label": f"{g.choice(colours)} {g.choice(shapes)}", "size": float(g.uniform(0.5, 1.2)),
                   "at": [float(g.uniform(-4, 4)), float(g.uniform(-0.5, 0.8)), float(g.uniform(-4, 4))]} for i in range(9)]
        source = sources[room % len(sources)]
        for t in range(each):
            start = [round(float(g.uniform(-1, 1)), 2), round(float(g.uniform(-1, 1)), 2), int(g.integers(36)) * 10]
            actions, scene, traj = some_actions(g), f"room_{room:05}", f"t{t:03}"
            world = walk(actions, start)
            c2w = walk(actions)
            kept = list(range(len(c2w)))
            views.append({"scene_id": scene, "traj_id": traj, "source": source, "anchor": None, "room": None,
                          "width": 40, "height": 40, "fov_x_deg": 90, "split": "heldout" if room % 4 == 3 else "train",
                          "actions": actions, "keyframes": kept, "kept": kept, "c2w": np.round(c2w, 6).tolist(),
                          "start": start if source == "simulated" else None, "teacher": "simulator", "teacher_settings": {},
                          "seed": 0, "qc": {"passed": bool(g.random() < 0.97), "why": ""},
                          "frames": [f"2_views/{scene}/{traj}/{k:03}.png" for k in kept],
                          "objects": [[e for e in (project(thing, pose) for thing in things) if e] for pose in world]})
    return views


def write_run(run, views, lines=()):
    (run / "2_views").mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    picture.save(run / "one.png")
    for frame in {frame for view in views for frame in view["frames"]}:
        (run / frame).parent.mkdir(parents=True, exist_ok=True)
        os.link(run / "one.png", run / frame)
    (run / "2_views/views.jsonl").write_text("".join(line + "\n" for line in [*map(json.dumps, views), *lines]))
    (run / "2_views/meta.json").write_text(json.dumps({"finished": True, "counts": {"trajectories": len(views)}}))
    return run


def build(run, **settings):
    qa.main(qa.Config(run=str(run), **settings))
    return {name: [json.loads(line) for line in (run / f"3_qa/{name}.jsonl").read_text().splitlines()]
            for name in ("static", "sft", "grpo", "heldout")}


def prompt(record):
    return record["messages"][0]["content"]


def answer(record):
    return record["messages"][1]["content"]


def digest(folder):
    files = [path for path in sorted(folder.iterdir()) if path.name != "meta.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    views = fake_views(rooms=250)
    run = write_run(tmp_path_factory.mktemp("run"), views)
    return run, views, build(run, heldout_per_task=0)


def everything(files):
    return [record for name in ("static", "sft", "heldout") for record in files[name]]


# ---- what every question keeps -------------------------------------------------------------------------------------------------

def test_all_tasks_are_there_and_every_answer_is_of_the_grammar(built):
    run, _, files = built
    assert {record["task_type"] for record in files["sft"]} == set(EIGHT)
    assert {record["task_type"] for record in files["static"]} == set(ALL) - set(EIGHT)
    assert {record["task_type"] for record in files["heldout"]} == set(ALL)
    for record in everything(files):
        assert re.fullmatch(GRAMMAR[record["task_type"]], answer(record)), record
        marks, words = re.fullmatch(r"((?:<image>)+)(.*)", prompt(record)).groups()
        assert len(record["images"]) == marks.count("<image>") == (1 if record["task_type"] in ("D2", "S1", "S2", "S3", "S4") else 2)
        assert "<image>" not in words and all((run / path).is_file() for path in record["images"])
        about_a_pair = {"difficulty"} if record["task_type"] not in ("S1", "S2", "S3", "S4") else set()
        assert {*record} - about_a_pair == {"task_type", "messages", "images", "scene_id", "traj_id", "split", "source", "teacher"}
        assert "{" not in words and "  " not in words


def test_several_phrasings_a_task_each_of_them_used(built, tmp_path):
    easier = build(write_run(tmp_path / "run", fake_views(rooms=20)), near_miss_box=150)
    records = [*everything(built[2]), *everything(easier)]
    for task, templates in qa.TEMPLATES.items():
        assert 2 <= len(templates) <= 4
        for template in templates:
            shape = "(<image>)+" + ".+".join(map(re.escape, re.split(r"{\w+}", template)))
            assert any(re.fullmatch(shape, prompt(r)) for r in records if r["task_type"] == task[:2]), template


def test_no_prompt_holds_its_answer(built):
    for record in everything(built[2]):
        task, words = record["task_type"], prompt(record)
        if task in qa.YES_NO:  # these name both answers
            assert all(f" {word}" in words for word in qa.YES_NO[task])
        else:
            assert answer(record) not in words
        if task in ("A1", "A2", "A3", "D3"):
            assert not re.search(r"left|right|forward|backward", words), words


def test_the_form_of_the_answer_is_stated(built):
    for record in everything(built[2]):
        form = prompt(record).rpartition("Answer")[2]
        for word in ("meters", "degrees"):
            assert word not in answer(record) or word in form
        assert ("x1, y1, x2, y2" in form) == (record["task_type"] in ("D1", "S1", "S5"))


def test_yes_and_no_are_equal_for_every_task_and_label(built):
    views = by_view(built[1])
    for name, records in built[2].items():
        tally = defaultdict(Counter)
        for record in records:
            task, view = record["task_type"], views[record["scene_id"], record["traj_id"]]
            if task in qa.YES_NO:
                named, box = re.search(r"any (\w+ \w+)", prompt(record)), re.search(BOX, prompt(record))
                label = named.group(1) if named else object_at(view, 0, box.group())["label"] if box else ""
                label = re.search(ACTION, prompt(record)).group().split()[1] if task == "A4" else label
                tally[task, label][answer(record)] += 1
                tally[task, "all"][answer(record)] += 1
        assert {task for task, _ in tally} == {"static": {"S2", "S6"}, "heldout": {*qa.YES_NO}}.get(name, {"A4", "D2", "D4"})
        for (task, label), count in tally.items():
            yes, no = (count[word] for word in qa.YES_NO[task])
            odd = name == "grpo" and abs(yes - no) == 1  # 125 is odd: its last question has no partner
            assert yes == no > 0 or odd, (name, task, label, count)
    sizes = defaultdict(Counter)  # D2: nor do the length of the way and the size of the box tell
    for record in (r for r in built[2]["sft"] if r["task_type"] == "D2"):
        x1, y1, x2, y2 = json.loads(re.search(BOX, prompt(record)).group())
        sizes[record["difficulty"], (x2 - x1) * (y2 - y1) > 40_000][answer(record)] += 1
    assert len(sizes) > 3 and all(count["yes"] == count["no"] for count in sizes.values())
    shifts = defaultdict(Counter)  # D4, S6: nor does the way from box to box, a turn to the left as its mirror image
    for record in (r for name in ("sft", "static") for r in built[2][name] if r["task_type"] in ("D4", "S6")):
        (l1, t1, r1, b1), (l2, t2, r2, b2) = map(json.loads, re.findall(BOX, prompt(record)))
        turn = sum(value * {"turn_left": -1, "turn_right": 1}.get(name, 0) for name, value in views[record["scene_id"], record["traj_id"]]["actions"])
        shift, (wide, tall) = (l2 + r2 - l1 - r1) / 2 * (-1 if turn < 0 else 1), np.log2([(r2 - l2) / (r1 - l1), (b2 - t2) / (b1 - t1)])
        shifts[record["task_type"], bool(turn), round(shift / 200), round(wide + tall), round(2 * (wide - tall))][answer(record)] += 1
    assert len(shifts) > 10 and all(count["yes"] == count["no"] for count in shifts.values())
    card = json.loads((built[0] / "3_qa/card.json").read_text())
    assert set(card["audits_must_be_0"].values()) == {0} and {*card["balance"]["sft"]} == {"A4", "D2", "D4"}


def test_held_out_scenes_are_in_no_training_file(built):
    held = {view["scene_id"] for view in built[1] if view["split"] == "heldout"}
    files = built[2]
    assert {r["scene_id"] for r in files["heldout"]} <= held
    for name in ("static", "sft", "grpo"):
        assert not {r["scene_id"] for r in files[name]} & held and {r["split"] for r in files[name]} == {"train"}


def test_a_trajectory_that_failed_the_quality_check_is_not_asked_about(built):
    failed = {(v["scene_id"], v["traj_id"]) for v in built[1] if not v["qc"]["passed"]}
    assert failed and not failed & {(r["scene_id"], r["traj_id"]) for r in everything(built[2])}


# ---- the answers are right: from the views, by other means ---------------------------------------------------------------------

def by_view(views):
    return {(view["scene_id"], view["traj_id"]): view for view in views}


def words_of(actions):
    names = {"forward": "move forward", "backward": "move backward", "shift_left": "move left", "shift_right": "move right",
             "turn_left": "turn left", "turn_right": "turn right"}
    return "; ".join(f"{names[n]} {v:g} {'degrees' if 'turn' in n else 'meters'}" for n, v in actions)


def actions_of(text):
    names = {"move forward": "forward", "move backward": "backward", "move left": "shift_left", "move right": "shift_right",
             "turn left": "turn_left", "turn right": "turn_right"}
    return [(names[" ".join(part.split()[:2])], float(part.split()[2])) for part in text.split("; ")]


def same_pose(one, two, tolerance=1e-6):
    return np.abs(walk(one)[-1] - walk(two)[-1]).max() < tolerance


def object_at(view, frame, box):
    return next(e for e in view["objects"][frame] if e["box"] == json.loads(box))


def is_usable(box):
    x1, y1, x2, y2 = box
    return min(x1, y1) >= 10 and max(x2, y2) <= 990 and 1e4 <= (x2 - x1) * (y2 - y1) <= 6e5


def test_answers_of_pairs_agree_with_the_views(built):
    views = by_view(built[1])
    for record in everything(built[2]):
        task, view, said = record["task_type"], views[record["scene_id"], record["traj_id"]], answer(record)
        if task in ("S1", "S2", "S3", "S4"):
            continue
        truth, boxes = words_of(view["actions"]), re.findall(BOX, prompt(record))
        assert record["images"] == [view["frames"][0], view["frames"][-1]][:len(record["images"])]
        assert all(is_usable(json.loads(box)) for box in boxes + re.findall(BOX, said))
        if task in ("D1", "D2", "D4"):
            assert truth in prompt(record)
        if task in ("S5", "S6"):  # they compare two pictures and name no motion
            assert not re.search(ACTION, prompt(record))
        moved, turned = (sum(v for n, v in view["actions"] if n.startswith("turn") == turns) for turns in (False, True))
        assert record["difficulty"] == f"{len(view['actions'])} {'far' if moved > 1 or turned > 40 else 'near'}"
        if boxes:
            first = object_at(view, 0, boxes[0])
            last = [e for e in view["objects"][-1] if e["id"] == first["id"]]
        if task in ("A1", "A2", "A3", "D3"):
            assert said == truth and len(view["actions"]) in {"A1": (1,), "A2": (1,), "A3": (2, 3), "D3": (1, 2)}[task]
        if task == "A4":
            statement = re.search(rf"{ACTION}(; {ACTION})*", prompt(record)).group()
            assert (statement == truth) == (said == "true")
            if said == "false":
                one, two = walk(actions_of(statement))[-1], walk(actions_of(truth))[-1]
                turned = np.degrees(np.arccos(np.clip((np.trace(one[:3, :3].T @ two[:3, :3]) - 1) / 2, -1, 1)))
                assert np.linalg.norm(one[:3, 3] - two[:3, 3]) >= 0.3 - 1e-6 or turned >= 20 - 1e-3
        if task in ("D1", "S5"):
            assert json.loads(said) == last[0]["box"]
        if task == "D2":
            assert (said == "yes") == (not last) and (said == "yes" or is_usable(last[0]["box"]))
        if task == "D3":
            assert json.loads(boxes[1]) == last[0]["box"]
        if task in ("D4", "S6"):
            assert (said == "yes") == (object_at(view, -1, boxes[1])["id"] == first["id"])
        if task == "D4" or task == "S6" and "object" not in prompt(record):  # else S6 asks about any two objects
            like = {e["id"] for k in (0, -1) for e in view["objects"][k] if e["label"] == first["label"]}
            assert len(like) >= 2 and object_at(view, -1, boxes[1])["label"] == first["label"]


def test_false_statements_are_near_misses_and_plainly_false_ones(built):
    """Of a false statement some share all actions' names with the truth, some differ in one, some in every one."""
    shared, views = Counter(), by_view(built[1])
    for record in (r for r in built[2]["sft"] if r["task_type"] == "A4" and answer(r) == "false"):
        truth = views[record["scene_id"], record["traj_id"]]["actions"]
        said = actions_of(re.search(rf"{ACTION}(; {ACTION})*", prompt(record)).group())
        assert len(said) == len(truth)
        shared["all" if (same := sum(a[0] == b[0] for a, b in zip(said, truth))) == len(truth) else "some" if same else "none"] += 1
    assert all(shared[kind] > 0.1 * sum(shared.values()) for kind in ("all", "some", "none")), shared


def test_answers_about_one_picture_agree_with_the_views(built):
    frames = {path: (view, k) for view in built[1] for k, path in enumerate(view["frames"])}
    for record in [r for r in everything(built[2]) if r["task_type"] in ("S1", "S2", "S3", "S4")]:
        task, said, (view, k) = record["task_type"], answer(record), frames[record["images"][0]]
        label = re.search("(red|green|blue) (ball|crate)", prompt(record))
        those = [e for e in view["objects"][k] if label and e["label"] == label.group()]
        if task == "S1":
            assert [e["box"] for e in those] == [json.loads(said)]
        if task == "S2" and (box := re.search(BOX, prompt(record))):
            assert (said == "yes") == (object_at(view, k, box.group())["label"] == label.group())
        elif task == "S2":
            assert (said == "yes") == any(is_usable(e["box"]) for e in those) and (said == "no") == (not those)
        if task == "S3":
            box = re.search(BOX, prompt(record))
            assert box or len(those) == 1
            thing = object_at(view, k, box.group()) if box else those[0]
            assert abs(thing["distance_m"] - float(said.split()[0])) <= 0.0501
        if task == "S4":
            facing = walk(view["actions"], view["start"])[k][:3, 2]
            off = np.degrees(np.arctan2(facing[0], facing[2])) - float(said.split()[0])
            assert abs((off + 180) % 360 - 180) < 1e-3


# ---- the only sequence that reaches its pose -----------------------------------------------------------------------------------

def asker_for(widest_turn_deg):
    views = [dict(v, actions=[("turn_left", widest_turn_deg)]) for v in fake_views(rooms=1, each=1)]
    return qa.Asker(qa.Config(), [*views, *[dict(v, actions=[("forward", 2.0)]) for v in views]])


def test_the_designs_example_is_not_asked():
    asker = asker_for(90)
    for actions in ([("turn_right", 90), ("forward", 1.0)], [("shift_right", 1.0), ("turn_right", 90)]):
        assert not asker.only_answer("A3", actions) and not asker.only_answer("D3", actions)
    assert asker.only_answer("D3", [("turn_right", 40), ("forward", 1.0)])
    assert not asker.only_answer("A3", [("turn_right", 40), ("forward", 1.0)])  # = left 50; right 1.0; right 90
    assert asker_for(80).only_answer("A3", [("turn_right", 40), ("forward", 1.0)])
    # ends where turn left 60; move right 1.0; turn right 50 does
    assert not asker_for(80).only_answer("A3", [("turn_right", 30), ("forward", 1.0), ("turn_left", 40)])
    assert not asker_for(80).only_answer("A3", [("forward", 1.0), ("shift_left", 1.0)])  # commutes, and is not in the grammar


@pytest.mark.parametrize("task,lengths", [("A1", (1,)), ("A2", (1,)), ("A3", (2, 3)), ("D3", (1, 2))])
def test_uniqueness_equals_brute_force_on_a_small_grid(task, lengths):
    moves = [(name, d / 10) for name in ("forward", "backward", "shift_left", "shift_right") for d in (1, 2, 3)]
    turns = [(name, float(a)) for name in ("turn_left", "turn_right") for a in range(10, 181, 10)]
    sequences = [list(steps) for n in lengths for kinds in ((moves, turns), (turns, moves))
                 for steps in itertools.product(*(kinds * 2)[:n])]
    ends = [np.round(walk(steps)[-1][[0, 2, 0, 0], [3, 3, 0, 2]], 5) + 0.0 for steps in sequences]
    reached = Counter(map(tuple, ends))
    only = [reached[tuple(end)] == 1 for end in ends]
    shared, enumerated = qa.shared_poses(0.3, 180, lengths)
    assert enumerated == len(sequences)
    mine = [int(qa.pose_key(*qa.pose(sequence))) not in shared for sequence in sequences]
    assert mine == only and 0 < sum(only)
    if task in ("A2",):
        assert not mine[sequences.index([("turn_left", 180.0)])]  # a half turn has no side


def test_no_two_questions_with_one_pose_and_two_answers(built):
    answers = defaultdict(set)
    for record in everything(built[2]):
        if record["task_type"] in ("A1", "A2", "A3"):
            end = walk(actions_of(answer(record)))[-1]
            answers[tuple(np.round(end[:3, [0, 3]].ravel(), 4) + 0.0)].add(answer(record))
    assert max(map(len, answers.values())) == 1
    dropped = json.loads((built[0] / "3_qa/card.json").read_text())["dropped"]
    assert dropped["A3: not the only sequence to its pose"] > 0


# ---- settings ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings,tasks,sources", [
    ({"directions": "forward"}, {"D1", "D2", "D4"}, {"real", "simulated"}),
    ({"directions": "inverse"}, {"A1", "A2", "A3", "A4", "D3"}, {"real", "simulated"}),
    ({"sources": "real"}, set(EIGHT), {"real"}), ({"sources": "simulated"}, set(EIGHT), {"simulated"}),
    ({"tasks": ["A2", "D1", "S4"]}, {"A2", "D1"}, {"real", "simulated"})])
def test_ablations_change_the_training_files_and_not_the_exam(tmp_path, settings, tasks, sources):
    views = fake_views(rooms=40, sources=("simulated", "real"))
    exam = build(write_run(tmp_path / "all", views))["heldout"]
    files = build(write_run(tmp_path / "ablated", views), **settings)
    for name in ("sft", "grpo"):
        assert {r["task_type"] for r in files[name]} == tasks and {r["source"] for r in files[name]} == sources
    assert files["heldout"] == exam
    if "tasks" in settings:
        assert {r["task_type"] for r in files["static"]} == {"S4"}


def test_grpo_is_a_subset_of_sft_of_the_size_asked_for(tmp_path):
    files = build(write_run(tmp_path / "run", fake_views(rooms=300)), grpo_per_task=11, heldout_per_task=7)
    trained = {json.dumps(r) for r in files["sft"]}
    assert all(json.dumps(r) in trained for r in files["grpo"])
    for name, most in (("grpo", 11), ("heldout", 7)):
        count = Counter(r["task_type"] for r in files[name])
        for task, number in count.items():
            assert number == most, (name, task, number)


def test_an_easier_lesson_about_the_same_views(tmp_path):
    """--most_actions 1 asks about single actions only, into a folder beside the questions about all; --near_miss_box: which D4 boxes are plainly another's."""
    run = write_run(tmp_path / "run", fake_views(rooms=20))
    files = build(run)
    qa.main(qa.Config(run=str(run), out="3_lesson", most_actions=1, near_miss_box=150))
    lesson = [json.loads(line) for line in (run / "3_lesson/sft.jsonl").read_text().splitlines()]
    steps = {(view["scene_id"], view["traj_id"]): len(view["actions"]) for view in map(json.loads, (run / "2_views/views.jsonl").read_text().splitlines())}
    assert {steps[r["scene_id"], r["traj_id"]] for r in lesson} == {1} < {steps[r["scene_id"], r["traj_id"]] for r in files["sft"]}
    assert (run / "3_qa/sft.jsonl").read_text().splitlines() == [json.dumps(r, ensure_ascii=False) for r in files["sft"]]
    views, said = by_view(list(map(json.loads, (run / "2_views/views.jsonl").read_text().splitlines()))), Counter()
    for record in (r for r in lesson if r["task_type"] == "D4"):
        view, (box, box2) = views[record["scene_id"], record["traj_id"]], re.findall(BOX, prompt(record))
        first, shown = object_at(view, 0, box), object_at(view, -1, box2)
        (x1, _, x2, _), (x3, _, x4, _) = next(e["box"] for e in view["objects"][-1] if e["id"] == first["id"]), shown["box"]
        assert first["id"] == shown["id"] if answer(record) == "yes" else abs(x1 + x2 - x3 - x4) >= 300
        said[answer(record), first["label"]] += 1
    assert len(said) > 4 and all(said["yes", label] == said["no", label] for _, label in said)


def test_a_red_ball_is_a_ball(tmp_path):
    """Pairs bear the shape's name alone: where a "red ball" stands, S2 asks for a "ball" neither as absent nor as the wrong name of the box."""
    views = fake_views(rooms=40)
    for view in views[::2]:  # half of the scenes name shapes only
        for entry in [entry for frame in view["objects"] for entry in frame if int(view["scene_id"][-1]) % 2]:
            entry["label"] = entry["label"].split()[1]
    frames, denied = {path: objects for view in views for path, objects in zip(view["frames"], view["objects"])}, 0
    for record in everything(build(write_run(tmp_path / "run", views))):
        if record["task_type"] == "S2" and answer(record) == "no":
            asked = re.search("((red|green|blue) )?(ball|crate)", prompt(record)).group()
            box = re.search(BOX, prompt(record))
            shown = [entry["label"] for entry in frames[record["images"][0]]
                     if not box or [round(v) for v in entry["box"] or []] == json.loads(box.group())]
            denied += " " not in asked
            assert shown or not box
            assert not any(label.endswith(asked) or asked.endswith(label) for label in shown)
    assert denied > 10


def test_box_step_rounds_every_box(tmp_path):
    files = build(write_run(tmp_path / "run", fake_views(rooms=20)), box_step=10)
    boxes = [json.loads(b) for r in everything(files) for b in re.findall(BOX, prompt(r) + answer(r))]
    assert boxes and all(v % 10 == 0 for box in boxes for v in box) and all(b[0] < b[2] and b[1] < b[3] for b in boxes)


def test_caps_and_pairs_of_keyframes(tmp_path):
    views = fake_views(rooms=20)
    build_one = build(write_run(tmp_path / "one", views), caps=["D1=1", "D2=0"])
    per_pair = Counter((r["scene_id"], r["traj_id"]) for r in everything(build_one) if r["task_type"] == "D1")
    assert set(per_pair.values()) == {1} and not any(r["task_type"] == "D2" for r in everything(build_one))
    half = build(write_run(tmp_path / "half", views), caps=["A2=0.5"])  # a cap below 1: one question on that share of the pairs
    asked, all_of_them = ([(r["scene_id"], r["traj_id"]) for r in everything(files) if r["task_type"] == "A2"] for files in (half, build_one))
    assert set(asked) < set(all_of_them) and 0.3 < len(asked) / len(all_of_them) < 0.7 and len(asked) == len(set(asked))
    four = build(write_run(tmp_path / "four", views), caps=["A4=4"])  # true and false by turns
    per_pair = Counter((r["scene_id"], r["traj_id"], answer(r)) for r in everything(four) if r["task_type"] == "A4")
    assert set(per_pair.values()) == {1, 2} and statistics.mode(per_pair.values()) == 2
    every = build(write_run(tmp_path / "every", views), pairs="keyframes")
    names, seen = by_view(views), set()
    for record in [r for r in everything(every) if r["task_type"] in ("A1", "A2", "A3")]:
        view = names[record["scene_id"], record["traj_id"]]
        a, b = (view["frames"].index(path) for path in record["images"])
        assert answer(record) == words_of(view["actions"][a:b])
        seen.add((a, b))
    assert {(0, 1), (1, 2), (0, 2), (1, 3)} <= seen


def test_views_of_one_start_are_asked_about_once(tmp_path):
    views = [v for v in fake_views(rooms=4, each=3)]
    for view in views:  # the three trajectories of a room set out from one pose
        view["start"], view["qc"]["passed"], view["split"] = views[0]["start"], True, "train"
        view["objects"] = [[] for _ in view["kept"]]
    files = build(write_run(tmp_path / "run", views))
    starts = [r["scene_id"] for r in files["static"] if r["images"][0].endswith("/000.png")]
    assert sorted(starts) == sorted({v["scene_id"] for v in views})


# ---- wrong input, kills, reruns ------------------------------------------------------------------------------------------------

def run_script(run, *flags):
    return subprocess.run([sys.executable, SCRIPT, "--run", run, *flags], capture_output=True, text=True)


def test_broken_records_are_named_counted_and_skipped(tmp_path, capsys):
    views = fake_views(rooms=12, each=3)
    good = [json.dumps(v) for v in views]
    wreck = [dict(views[0], traj_id=f"w{k}", **change) for k, change in enumerate([
        {"actions": [["fly_up", 1.0]]}, {"actions": [["forward", 0.15]]}, {"actions": [["forward", 300]]},
        {"frames": ["../../secret"] * len(views[0]["kept"])},
        {"objects": [[]]}, {"split": "test"}, {"qc": None}, {"start": "here"}, {"kept": [0]}, {"c2w": []}, {"actions": None},
        {"objects": [[{"id": 1, "label": 7, "box": [1, 2, 3, 4]}]] * len(views[0]["kept"])},
        {"objects": [[{"id": 1, "label": "red ball", "box": "everywhere"}]] * len(views[0]["kept"])}])]
    del wreck[5]["teacher"]
    lost = dict(views[1], traj_id="lost", frames=["2_views/nowhere.png"] * len(views[1]["kept"]))
    cut = dict(views[1], traj_id="cut", frames=["2_views/cut.png"] * len(views[1]["kept"]))
    leak = dict(next(v for v in views if v["split"] == "heldout" and v["qc"]["passed"]), traj_id="leak", split="train")
    bad = [good[0][:80], "[]", "", "\udcff".encode("utf-8", "surrogateescape").decode("latin1"), *map(json.dumps, wreck)]
    clean = build(write_run(tmp_path / "clean", views))
    run = write_run(tmp_path / "dirty", views, [*bad, json.dumps(lost), json.dumps(cut), good[2], json.dumps(leak)])
    (run / "2_views/cut.png").write_bytes((run / "one.png").read_bytes()[:-20])
    capsys.readouterr()
    dirty = build(run)
    said = capsys.readouterr().err
    for number in range(len(views) + 1, len(views) + len(bad) + 4):
        assert f"views.jsonl:{number}: skipped" in said
    assert "leak" in said and "splits are by scene" in said and "Traceback" not in said
    skipped = json.loads((run / "3_qa/card.json").read_text())["views"]["skipped"]
    assert skipped["broken record"] == len(bad) and skipped["frame missing"] == 2
    assert skipped["duplicate"] == skipped["held-out scene in training"] == 1
    strip = lambda files: [r for r in everything(files) if r["task_type"] not in qa.YES_NO]  # A4 takes numbers from all views
    assert strip(clean) == strip(dirty)


def test_bad_settings_and_missing_input_end_with_one_line(tmp_path, capsys):
    done = run_script(tmp_path / "nothing")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    run = write_run(tmp_path / "run", fake_views(rooms=2, each=1))
    for settings in ({"directions": "sideways"}, {"tasks": ["A9"]}, {"caps": ["D1=many"]}, {"pairs": "all"}):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            build(run, **settings)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and re.search("sideways|A9|many|all", said)
    assert not (run / "3_qa/meta.json").exists()


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    views = fake_views(rooms=60, each=8)
    calm, stormy = write_run(tmp_path / "calm", views), write_run(tmp_path / "stormy", views)
    assert run_script(calm).returncode == 0
    killed = 0
    for patience_s in (0.05, 0.4):  # counted from the moment when the output folder appears
        child = subprocess.Popen([sys.executable, SCRIPT, "--run", stormy], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (stormy / "3_qa/meta.json").exists():
            time.sleep(0.005)
        time.sleep(patience_s)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.wait()
    assert killed and run_script(stormy).returncode == 0
    assert digest(calm / "3_qa") == digest(stormy / "3_qa")
    one, two = (json.loads((run / "3_qa/meta.json").read_text()) for run in (calm, stormy))
    assert one | {"seconds": 0} == two | {"seconds": 0}
    before = digest(calm / "3_qa")
    again = run_script(calm)
    assert again.returncode == 0 and "nothing to do" in again.stdout and digest(calm / "3_qa") == before
    other = run_script(calm, "--seed", "5")
    assert other.returncode == 2 and "seed was 0, now 5" in other.stderr


def test_the_order_of_the_views_does_not_matter(tmp_path):
    views = fake_views(rooms=15)
    one, two = (build(write_run(tmp_path / name, v)) for name, v in (("as_is", views), ("turned", views[::-1])))
    for name in one:
        assert sorted(map(json.dumps, one[name])) == sorted(map(json.dumps, two[name]))


def test_two_thousand_questions_a_second(built, capsys):
    run = write_run(built[0].parent / f"speed{time.time_ns()}", built[1])
    qa.main(qa.Config(run=str(run)))
    rate = int(re.search(r"(\d+) a second", capsys.readouterr().out).group(1))
    assert rate > 2000


# ---- views without exact boxes -------------------------------------------------------------------------------------------------

def seen_by_detector(view, dropped=()):
    """The exact boxes as a detector would give them: no ids, another order, a colour per thing."""
    found = []
    for k, frame in enumerate(view["objects"]):
        found.append([{"label": e["label"], "box": e["box"], "score": 0.9, "colour": np.full(3, (e["id"] * 0.37) % 1, np.float32)}
                      for e in reversed(frame) if (k, e["id"]) not in dropped])
    return found


def test_tracks_follow_turns_and_know_what_left_the_view():
    views = [v for v in fake_views(rooms=150) if len(v["actions"]) == 1 and v["actions"][0][0].startswith("turn")]
    right = wrong = gone_right = gone_wrong = 0
    for view in views:
        objects = qa.track(view, seen_by_detector(view))
        exact = [{json.dumps(e["box"]) + e["label"]: e["id"] for e in frame} for frame in view["objects"]]
        first = {e["id"]: exact[0][json.dumps(e["box"]) + e["label"]] for e in objects[0]}
        for e in objects[1]:
            if e["id"] in first and e["box"]:
                good = exact[1][json.dumps(e["box"]) + e["label"]] == first[e["id"]]
                right, wrong = right + good, wrong + (not good)
            elif e["id"] in first:
                still = first[e["id"]] in exact[1].values()
                gone_right, gone_wrong = gone_right + (not still), gone_wrong + still
    assert right > 50 and wrong <= 0.02 * right and gone_right > 50 and gone_wrong <= 0.02 * gone_right


def test_two_like_things_that_could_be_either_are_not_tracked():
    view = {"kept": [0, 1], "c2w": walk([("forward", 1.0)]), "width": 40, "height": 40, "fov_x_deg": 90}
    grey = np.full(3, 0.5, np.float32)
    thing = lambda *box: {"label": "chair", "box": list(box), "score": 0.9, "colour": grey}
    objects = qa.track(view, [[thing(400, 400, 500, 500)], [thing(370, 400, 470, 500), thing(430, 400, 530, 500)]])
    assert not {e["id"] for e in objects[0]} & {e["id"] for e in objects[1]}
    objects = qa.track(view, [[thing(400, 400, 500, 500)], [thing(390, 390, 510, 510), thing(800, 400, 900, 500)]])
    assert {e["id"] for e in objects[0]} & {e["id"] for e in objects[1] if e["box"] == [390, 390, 510, 510]}


def test_a_missed_detection_is_not_called_a_disappearance(tmp_path):
    view = next(v for v in fake_views(rooms=20) if len(v["actions"]) == 1 and v["actions"][0] == tuple(v["actions"][0])
                and v["actions"][0][0].startswith("turn") and v["actions"][0][1] == 10
                and any(is_usable(e["box"]) and any(o["id"] == e["id"] for o in v["objects"][1]) for e in v["objects"][0]))
    thing = next(e for e in view["objects"][0] if is_usable(e["box"]) and any(o["id"] == e["id"] for o in view["objects"][1]))
    tracked = qa.track(view, seen_by_detector(view, dropped={(1, thing["id"])}))
    blind = qa.slim(view | {"objects": None}, True) | {"objects": tracked}
    asker = qa.Asker(qa.Config(caps=["D2=9"]), [blind])
    assert not any(q.task == "D2" and q.answer == "yes" and str(thing["box"]) in q.prompt for q in asker.ask(blind))


def test_a_detector_loads_from_safetensors_and_boxes_reach_the_questions(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = transformers.YolosForObjectDetection(transformers.YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[64, 64], patch_size=16,
        num_detection_tokens=1, id2label={0: "lamp", 1: "chair"}, label2id={"lamp": 0, "chair": 1}))
    model.class_labels_classifier.layers[-1].bias.data = torch.tensor([3.0, 0.0, -3.0])
    model.save_pretrained(tmp_path / "detector")
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil
    YolosImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(tmp_path / "detector")
    views = [dict(v, objects=None, source="real", start=None) for v in fake_views(rooms=8)]
    run = write_run(tmp_path / "run", views)
    files = build(run, detector=str(tmp_path / "detector"), detector_threshold=0.1, min_score=0.1, min_area=0.0001, border=0.0,
                  max_area=1.0)
    boxes = {r["task_type"] for r in everything(files) if re.search(BOX, prompt(r) + answer(r))}
    assert boxes and not {"S2", "S3", "S4"} & {r["task_type"] for r in everything(files)}
    (tmp_path / "detector/model.safetensors").rename(tmp_path / "detector/pytorch_model.bin")
    with pytest.raises(SystemExit) as stopped:
        qa.load_detector(str(tmp_path / "detector"), [], 0.2)
    assert stopped.value.code == 2


def test_a_zero_shot_detector_finds_the_labels_it_is_given(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
    letters = [chr(c) for c in range(97, 123)]
    words = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *[letter + "</w>" for letter in letters]]
    vocab = {word: k for k, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], pad_token="!", model_max_length=16)
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.OwlViTForObjectDetection(transformers.OwlViTConfig(
        text_config=dict(small, vocab_size=len(vocab), max_position_embeddings=16, bos_token_id=1, eos_token_id=2),
        vision_config=dict(small, image_size=64, patch_size=32), projection_dim=32))
    model.box_head.dense2.weight.data.zero_()  # boxes half as wide as the picture, one around each of the four patches
    model.box_head.dense2.bias.data.zero_()
    model.save_pretrained(tmp_path / "owl")
    pictures = OwlViTImageProcessorPil(size={"height": 64, "width": 64})
    transformers.OwlViTProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(tmp_path / "owl")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    found = qa.load_detector(str(tmp_path / "owl"), ["lamp", "chair"], 0.0)([tmp_path / "red.png"] * 2)
    assert [len(boxes) for boxes in found] == [4, 4] and {box["label"] for box in found[0]} <= {"lamp", "chair"}
    assert all(0 <= v <= 1000 for box in found[0] for v in box["box"]) and np.allclose(found[0][0]["colour"], (1, 0, 0), atol=.02)
    with pytest.raises(SystemExit):
        qa.load_detector(str(tmp_path / "owl"), [], 0.2)
    assert "--detector_labels" in capsys.readouterr().err


def test_without_boxes_only_the_motion_is_asked(tmp_path):
    views = [dict(v, objects=None, source="real", start=None) for v in fake_views(rooms=8)]
    files = build(write_run(tmp_path / "run", views))
    assert {r["task_type"] for r in everything(files)} == {"A1", "A2", "A3", "A4"}
