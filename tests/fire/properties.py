"""Properties that hold for every input (hypothesis): geometry, the answers' grammar, the reward, boxes, splits and shards."""
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
from harness import SCRIPTS, Row
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st


def load(stage: str):
    """A script as a module."""
    path = SCRIPTS[stage]
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


sample, imagine, qa, sft, refine, exam = (load(stage) for stage in SCRIPTS)
MOVE = st.tuples(st.sampled_from([*sample.MOVES]), st.integers(1, 100).map(lambda n: n / 10))
TURN = st.tuples(st.sampled_from([*sample.TURNS]), st.integers(1, 18).map(lambda n: 10.0 * n))
ACTIONS = st.lists(st.one_of(MOVE, TURN), min_size=1, max_size=3)
BOX = st.lists(st.integers(0, 1000), min_size=4, max_size=4)
WILD_BOX = st.lists(st.floats(-3000, 3000), min_size=4, max_size=4)
ONE_ANSWER = {"A1": MOVE.map(lambda a: [a]), "A2": TURN.map(lambda a: [a]), "A3": ACTIONS, "D3": ACTIONS}
BACK = {"forward": "backward", "backward": "forward", "shift_left": "shift_right", "shift_right": "shift_left", "turn_left": "turn_right",
        "turn_right": "turn_left"}


# --- geometry ---
@given(ACTIONS)
def undoing_every_action_in_reverse_leads_home(actions):
    c2w, _ = sample.integrate(actions + [(BACK[name], value) for name, value in reversed(actions)])
    assert np.allclose(c2w[-1], np.eye(4), atol=1e-4)


@given(ACTIONS)
def every_pose_is_a_level_rotation(actions):
    c2w, keyframes = sample.integrate(actions)
    R = c2w[:, :3, :3].astype(float)
    assert np.allclose(R @ R.transpose(0, 2, 1), np.eye(3), atol=1e-5) and np.allclose(np.linalg.det(R), 1, atol=1e-5)
    assert np.allclose(R[:, 1], [0, 1, 0]) and np.all(c2w[:, 1, 3] == 0) and np.array_equal(c2w[0], np.eye(4))
    assert keyframes[0] == 0 and keyframes[-1] == len(c2w) - 1 and np.all(np.diff(keyframes) >= 7)


@given(ACTIONS)
def no_frame_is_further_than_a_step_from_the_last(actions):
    c2w, _ = sample.integrate(actions)
    assert np.linalg.norm(np.diff(c2w[:, :3, 3].astype(float), axis=0), axis=1).max() <= 0.2 + 1e-5
    turned = np.diff(np.unwrap(np.arctan2(c2w[:, 0, 2], c2w[:, 0, 0])))
    assert np.rad2deg(np.abs(turned)).max(initial=0) <= 5 + 1e-3


@given(ACTIONS)
def the_pose_of_01_is_the_pose_of_03(actions):
    end, (x, z, yaw) = sample.integrate(actions)[0][-1], qa.pose(actions)
    assert np.allclose([end[0, 3], end[2, 3]], [x, z], atol=1e-3)
    assert abs((math.degrees(math.atan2(end[0, 2], end[0, 0])) - yaw + 180) % 360 - 180) < 1e-2


@given(st.sampled_from(["turn_left", "turn_right"]), st.integers(1, 8), st.floats(2, 20))
def turning_left_moves_what_is_ahead_to_the_right(name, tens, z):
    c2w = sample.integrate([(name, 10.0 * tens)])[0][-1]
    x, _, depth, _ = np.linalg.inv(c2w) @ [0, 0, z, 1]
    assert (x > 0) == (name == "turn_left") and depth > 0


@given(st.floats(0, 1), st.floats(-170, 170))
def yaw_is_read_back_as_it_was_written(_, yaw):
    assert abs(imagine.yaw_deg_of(imagine.yaw_matrix(yaw)) - yaw) < 1e-4


# --- the grammar of answers ---
@given(ACTIONS)
def saying_and_parsing_actions_is_the_identity(actions):
    said = qa.say(actions)
    assert qa.unsay(said) == actions and refine.parse_actions(said) == [(name, float(value)) for name, value in actions] == exam.parse_actions(said)


@given(BOX)
def saying_and_parsing_a_box_is_the_identity(box):
    assert refine.parse_box(str(box)) == ([float(v) for v in box], True)


@given(st.integers(0, 3600), st.sampled_from(["meters", "degrees"]))
def saying_and_parsing_a_quantity_is_the_identity(tenths, unit):
    assert refine.parse_quantity(f"{tenths / 10:g} {unit}", unit) == tenths / 10


@given(st.sampled_from(sorted(refine.SHAPE)), st.one_of(st.text(max_size=250), st.none(), st.integers(), st.lists(st.text())), st.text(max_size=250))
def nothing_makes_the_reward_raise_or_leave_its_bounds(task, answer, response):
    overall = refine.reward(task, answer, response)["overall"]
    assert overall == -1 or 0 <= overall <= 1 and math.isfinite(overall)


# --- the reward ---
def truth_of(task, data):
    if refine.SHAPE[task] == "box":
        x1, x2 = sorted(data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
        y1, y2 = sorted(data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
        return str([x1, y1, x2, y2])
    if task in ONE_ANSWER:
        return qa.say(data.draw(ONE_ANSWER[task]))
    if task in ("S3", "S4"):
        return f"{data.draw(st.integers(0, 350)) / (10 if task == 'S3' else 1):g} {refine.SHAPE[task]}"
    return data.draw(st.sampled_from(["true", "false"] if task == "A4" else ["yes", "no"]))


@given(st.sampled_from(sorted(refine.SHAPE)), st.data())
def the_truth_earns_everything(task, data):
    truth = truth_of(task, data)
    assert abs(refine.reward(task, truth, truth)["overall"] - 1) < 1e-9


@given(st.sampled_from(sorted(refine.SHAPE)), st.data())
def nothing_earns_more_than_the_truth_nor_two_answers_more_than_one(task, data):
    truth, other = truth_of(task, data), truth_of(task, data)
    alone = refine.reward(task, truth, other)["overall"]
    assert alone <= 1 and refine.reward(task, truth, f"{other} or {truth}")["overall"] <= alone
    assert refine.reward(task, truth, f"{other}. {truth}")["overall"] <= 1


@given(MOVE, st.integers(0, 80), st.integers(0, 80))
def a_nearer_distance_never_earns_less(action, one, two):
    near, far = sorted((one, two))
    name, value = action
    earned = [refine.reward("A1", qa.say([action]), qa.say([(name, round(value + error / 10, 1))]))["overall"] for error in (near, far)]
    assert earned[0] >= earned[1] - 1e-12


@given(TURN, st.integers(0, 18), st.integers(0, 18))
def a_nearer_angle_never_earns_less(action, one, two):
    near, far = sorted((one, two))
    name, value = action
    earned = [refine.reward("A2", qa.say([action]), qa.say([(name, value + 10 * error)]))["overall"] for error in (near, far)]
    assert earned[0] >= earned[1] - 1e-12


@given(ACTIONS, ACTIONS, ACTIONS)
def an_action_too_many_never_earns_more(true, said, more):
    short, long = refine.reward("A3", qa.say(true), qa.say(true)), refine.reward("A3", qa.say(true), qa.say(true + more))
    assert short["overall"] > long["overall"]


@given(st.data(), st.integers(0, 400), st.integers(0, 400))
def a_box_shifted_less_never_earns_less(data, one, two):
    x1, y1, w, h = (data.draw(st.integers(a, b)) for a, b in ((0, 300), (0, 900), (20, 200), (20, 100)))
    near, far = sorted((one, two))
    earned = [refine.reward("D1", str([x1, y1, x1 + w, y1 + h]), str([x1 + d, y1, x1 + w + d, y1 + h]))["overall"] for d in (near, far)]
    assert earned[0] >= earned[1] - 1e-12


# --- boxes ---
@given(WILD_BOX, WILD_BOX)
def iou_is_symmetric_and_between_0_and_1(a, b):
    assert refine.box_iou(a, b) == refine.box_iou(b, a) and 0 <= refine.box_iou(a, b) <= 1


@given(BOX)
def iou_of_a_box_with_itself_is_1(box):
    assume(box[0] != box[2] and box[1] != box[3])
    assert refine.box_iou(box, box) == 1 == refine.box_iou(box, [box[2], box[3], box[0], box[1]])


@given(BOX, BOX, st.integers(-500, 500))
def iou_of_03_does_not_depend_on_where_both_lie(a, b, by):
    a, b = refine.sides(a), refine.sides(b)
    assert abs(qa.iou(a, b) - qa.iou([v + by for v in a], [v + by for v in b])) < 1e-9


@given(BOX, BOX)
def a_part_of_a_box_has_its_share_as_iou(outer, inner):
    outer, inner = refine.sides(outer), refine.sides(inner)
    inside = [max(outer[0], min(outer[2], inner[0])), max(outer[1], min(outer[3], inner[1])), max(outer[0], min(outer[2], inner[2])),
              max(outer[1], min(outer[3], inner[3]))]
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    assume(area(outer))
    assert abs(refine.box_iou(outer, inside) - area(inside) / area(outer)) < 1e-9


# --- splits, shards, batches ---
@given(st.integers(2, 60), st.integers(0, 1000), st.floats(0.01, 0.9))
def a_new_scene_moves_no_other_between_the_splits(n, seed, share):
    cfg = sample.Config(rooms=1, seed=seed, heldout=share)
    scenes = [{"scene_id": f"room_{i:05d}", "source": "simulated"} for i in range(n + 1)]
    few, many = sample.draw_splits(scenes[:n], cfg), sample.draw_splits(scenes, cfg)
    assert {*few.values()} == {"train", "heldout"} and sum(few[name] != many[name] for name in few) <= 1  # one where the least had to be chosen


@given(st.permutations(range(12)), st.integers(0, 99))
def the_order_of_the_scenes_does_not_matter(order, seed):
    cfg = sample.Config(rooms=1, seed=seed, heldout=0.3)
    scenes = [{"scene_id": f"room_{i:05d}", "source": "simulated"} for i in order]
    assert sample.draw_splits(scenes, cfg) == sample.draw_splits(sorted(scenes, key=lambda s: s["scene_id"]), cfg)


@given(st.integers(1, 200), st.integers(1, 20))
def shards_cover_every_trajectory_once(n, shards):
    jobs = list(range(n))
    assert sorted(job for shard in range(shards) for job in jobs[shard::shards]) == jobs


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 16), st.integers(0, 9), st.integers(1, 40))
def an_epoch_of_batches_holds_every_question_once(pictures, at_most, seed, size):
    questions = [{"images": [str(p)], "number": i} for i, p in enumerate(pictures)]
    groups, seen = sft.group_by_pictures(questions, at_most), []
    assert sorted(q["number"] for group in groups for q in group) == list(range(len(questions))) and max(map(len, groups)) <= at_most
    for batch in sft.batches(groups, size, seed):
        seen += [question["number"] for group in batch for question in group]
        if len(seen) >= len(questions):
            break
    assert sorted(seen[:len(questions)]) == list(range(len(questions)))


@given(st.text(min_size=1, max_size=20), st.floats(0, 1))
def a_scene_is_for_validation_whatever_else_is_in_the_file(scene, share):
    one, two = ({"scene_id": scene, "images": [image]} for image in ("a", "b"))
    assert sft.in_validation(one, share) == sft.in_validation(two, share) and not sft.in_validation(one, 0) and sft.in_validation(one, 1)


PROPERTIES = [value for value in list(globals().values()) if hasattr(value, "hypothesis")]


def check(place: Path, examples: int) -> Row:
    """Every property on `examples` drawn inputs."""
    row = Row("properties (hypothesis)")
    for one in PROPERTIES:
        tried = [0]
        one.hypothesis.inner_test = counting(one.hypothesis.inner_test, tried)
        rule = settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))(one)
        try:
            rule()
        except AssertionError as error:
            row.complaints.append(f"{one.__name__}: {error} {getattr(error, '__notes__', '')}")
            row.tried += 1
        row.tried += tried[0]
        row.survived += tried[0]
    return row


def counting(test, tried: list[int]):
    def counted(*args, **kwargs):
        tried[0] += 1
        test(*args, **kwargs)
    return counted
