"""Properties that hold for every input (hypothesis): geometry, answers, rewards, boxes, splits."""

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


sample, imagine, qa, sft, refine, evaluate = (load(stage) for stage in SCRIPTS)
MOVE = st.tuples(st.sampled_from([*sample.MOVES]), st.integers(1, 100).map(lambda n: n / 10))
TURN = st.tuples(st.sampled_from([*sample.TURNS]), st.integers(1, 18).map(lambda n: 10.0 * n))
ACTIONS = st.lists(st.one_of(MOVE, TURN), min_size=1, max_size=3)
BOX = st.lists(st.integers(0, 1000), min_size=4, max_size=4)
WILD_BOX = st.lists(st.floats(-3000, 3000), min_size=4, max_size=4)
TASK = st.sampled_from(sorted(refine.ANSWER_TYPES))
SHARE, SEED, STEP = st.floats(0, 1), st.integers(0, 1000), st.integers(0, 18)
OPPOSITE = {"forward": "backward", "shift_left": "shift_right", "turn_left": "turn_right"}
OPPOSITE |= {back: name for name, back in OPPOSITE.items()}


def earns(task: str, answer: str, response) -> float:
    return refine.reward(task, answer, response)["overall"]


# --- geometry ---
@given(ACTIONS)
def undoing_every_action_in_reverse_leads_home(actions):
    back = [(OPPOSITE[name], value) for name, value in reversed(actions)]
    c2w, _ = sample.integrate(actions + back)
    assert np.allclose(c2w[-1], np.eye(4), atol=1e-4)


@given(ACTIONS)
def every_pose_is_a_level_rotation(actions):
    c2w, keyframes = sample.integrate(actions)
    R = c2w[:, :3, :3].astype(float)
    assert np.allclose(R @ R.transpose(0, 2, 1), np.eye(3), atol=1e-5)
    assert np.allclose(np.linalg.det(R), 1, atol=1e-5)
    assert np.allclose(R[:, 1], [0, 1, 0]) and np.all(c2w[:, 1, 3] == 0)
    assert np.array_equal(c2w[0], np.eye(4))
    assert keyframes[0] == 0 and keyframes[-1] == len(c2w) - 1 and np.all(np.diff(keyframes) >= 7)


@given(ACTIONS)
def no_frame_is_further_than_a_step_from_the_last(actions):
    c2w, _ = sample.integrate(actions)
    moved = np.diff(c2w[:, :3, 3].astype(float), axis=0)
    assert np.linalg.norm(moved, axis=1).max() <= 0.2 + 1e-5
    turned = np.diff(np.unwrap(np.arctan2(c2w[:, 0, 2], c2w[:, 0, 0])))
    assert np.rad2deg(np.abs(turned)).max(initial=0) <= 5 + 1e-3


@given(ACTIONS)
def the_pose_of_01_is_the_pose_of_03(actions):
    end, (position, yaw) = sample.integrate(actions)[0][-1], qa.pose(actions)
    assert np.allclose([end[2, 3], end[0, 3]], [position.real, position.imag], atol=1e-3)
    turned = math.degrees(math.atan2(end[0, 2], end[0, 0]))
    assert abs((turned - yaw + 180) % 360 - 180) < 1e-2


@given(st.sampled_from([*sample.TURNS]), st.integers(1, 8), st.floats(2, 20))
def turning_left_moves_what_is_ahead_to_the_right(name, tens, z):
    c2w = sample.integrate([(name, 10.0 * tens)])[0][-1]
    x, _, depth, _ = np.linalg.inv(c2w) @ [0, 0, z, 1]
    assert (x > 0) == (name == "turn_left") and depth > 0


@given(st.floats(-170, 170))
def yaw_is_read_back_as_it_was_written(yaw):
    assert abs(imagine.yaw_deg_of(imagine.yaw_matrix(yaw)) - yaw) < 1e-4


# --- the grammar of answers ---
@given(ACTIONS)
def saying_and_parsing_actions_is_the_identity(actions):
    said = qa.say(actions)
    assert actions == refine.parse_actions(said) == evaluate.parse_actions(said)


@given(BOX)
def saying_and_parsing_a_box_is_the_identity(box):
    assert refine.parse_box(str(box)) == (box, True)


@given(st.integers(0, 3600), st.sampled_from(["meters", "degrees"]))
def saying_and_parsing_a_quantity_is_the_identity(tenths, unit):
    assert refine.parse_quantity(f"{tenths / 10:g} {unit}", unit) == tenths / 10


ANYTHING = st.one_of(st.text(max_size=250), st.none(), st.integers(), st.lists(st.text()))


@given(TASK, ANYTHING, st.text(max_size=250))
def nothing_makes_the_reward_raise_or_leave_its_bounds(task, answer, response):
    overall = earns(task, answer, response)
    assert overall == -1 or 0 <= overall <= 1


# --- the reward ---
def truth_of(task: str, data) -> str:
    kind = refine.ANSWER_TYPES[task]
    if kind == "box":
        side = st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted)
        (x1, x2), (y1, y2) = data.draw(side), data.draw(side)
        return str([x1, y1, x2, y2])
    if kind == "motion":
        return qa.say([data.draw(MOVE if task == "A1" else TURN)])
    if kind == "motions":
        return qa.say(data.draw(ACTIONS))
    if kind == "yes_no":
        return data.draw(st.sampled_from(["true", "false"] if task == "A4" else ["yes", "no"]))
    if kind == "relation":
        return data.draw(st.sampled_from([*qa.SIDES, *qa.WAYS]))
    return f"{data.draw(st.integers(0, 350)) / (10 if kind == 'meters' else 1):g} {kind}"


@given(TASK, st.data())
def the_truth_earns_everything(task, data):
    truth = truth_of(task, data)
    assert abs(earns(task, truth, truth) - 1) < 1e-9


@given(TASK, st.data())
def nothing_earns_more_than_the_truth_nor_two_answers_more_than_one(task, data):
    truth, other = truth_of(task, data), truth_of(task, data)
    alone = earns(task, truth, other)
    assert alone <= 1 and earns(task, truth, f"{other} or {truth}") <= alone
    assert earns(task, truth, f"{other}. {truth}") <= 1


@given(MOVE, st.integers(0, 80), st.integers(0, 80))
def a_nearer_distance_never_earns_less(action, one, two):
    name, value = action
    said = [qa.say([(name, round(value + error / 10, 1))]) for error in sorted((one, two))]
    near, far = (earns("A1", qa.say([action]), response) for response in said)
    assert near >= far - 1e-12


@given(TURN, STEP, STEP)
def a_nearer_angle_never_earns_less(action, one, two):
    name, value = action
    said = [qa.say([(name, value + 10 * error)]) for error in sorted((one, two))]
    near, far = (earns("A2", qa.say([action]), response) for response in said)
    assert near >= far - 1e-12


@given(ACTIONS, ACTIONS)
def an_action_too_many_never_earns_more(true, more):
    true, longer = qa.say(true), qa.say(true + more)
    assert earns("A3", true, true) > earns("A3", true, longer)


@given(st.data(), st.integers(0, 400), st.integers(0, 400))
def a_box_shifted_less_never_earns_less(data, one, two):
    ranges = ((0, 300), (0, 900), (20, 200), (20, 100))
    x, y, w, h = (data.draw(st.integers(*ends)) for ends in ranges)
    said = [str([x + by, y, x + w + by, y + h]) for by in sorted((one, two))]
    near, far = (earns("D1", str([x, y, x + w, y + h]), response) for response in said)
    assert near >= far - 1e-12


# --- boxes ---
@given(WILD_BOX, WILD_BOX)
def iou_is_symmetric_and_between_0_and_1(a, b):
    assert refine.box_iou(a, b) == refine.box_iou(b, a) and 0 <= refine.box_iou(a, b) <= 1


@given(BOX)
def iou_of_a_box_with_itself_is_1(box):
    x1, y1, x2, y2 = box
    assume(x1 != x2 and y1 != y2)
    assert refine.box_iou(box, box) == 1 == refine.box_iou(box, [x2, y2, x1, y1])


@given(BOX, BOX, st.integers(-500, 500))
def iou_of_03_does_not_depend_on_where_both_lie(a, b, by):
    a, b = refine.sorted_box(a), refine.sorted_box(b)
    assert abs(qa.iou(a, b) - qa.iou([v + by for v in a], [v + by for v in b])) < 1e-9


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@given(BOX, BOX)
def a_part_of_a_box_has_its_share_as_iou(outer, inner):
    outer, inner = refine.sorted_box(outer), refine.sorted_box(inner)
    inside = [min(outer[k % 2 + 2], max(outer[k % 2], inner[k])) for k in range(4)]
    assume(area(outer))
    assert abs(refine.box_iou(outer, inside) - area(inside) / area(outer)) < 1e-9


# --- splits, shards, batches ---
def rooms(numbers) -> list[dict]:
    return [{"scene_id": f"room_{n:05d}", "source": "simulated"} for n in numbers]


@given(st.integers(2, 60), SEED, st.floats(0.01, 0.9))
def a_new_scene_moves_no_other_between_the_splits(n, seed, share):
    cfg = sample.Config(rooms=1, seed=seed, heldout=share)
    few, many = (sample.draw_splits(rooms(range(count)), cfg) for count in (n, n + 1))
    assert {*few.values()} == {"train", "heldout"}
    moved = [name for name in few if few[name] != many[name]]
    assert len(moved) <= 1  # one where the least had to be chosen


@given(st.permutations(range(12)), SEED)
def the_order_of_the_scenes_does_not_matter(order, seed):
    cfg = sample.Config(rooms=1, seed=seed, heldout=0.3)
    assert sample.draw_splits(rooms(order), cfg) == sample.draw_splits(rooms(range(12)), cfg)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=90), SEED, st.integers(1, 40))
def an_epoch_of_batches_holds_every_question_once(pictures, seed, size):
    questions = [{"images": [str(p)], "number": i} for i, p in enumerate(pictures)]
    groups, seen = sft.group_by_pictures(questions), []
    assert max(map(len, groups)) <= sft.SHARE_AT_MOST
    for batch in sft.batches(groups, size, seed):
        seen += [question["number"] for group in batch for question in group]
        if len(seen) >= len(questions):
            break
    assert sorted(seen[: len(questions)]) == [*range(len(questions))]


@given(st.text(min_size=1, max_size=20), SHARE)
def a_scene_is_for_validation_whatever_else_is_in_the_file(scene, share):
    one, two = ({"scene_id": scene, "images": [image]} for image in ("a", "b"))
    assert sft.in_validation(one, share) == sft.in_validation(two, share)
    assert not sft.in_validation(one, 0) and sft.in_validation(one, 1)


PROPERTIES = [value for value in list(globals().values()) if hasattr(value, "hypothesis")]


def check(stage: str, whole: Path, place: Path, examples: int) -> Row:
    """Every property on `examples` drawn inputs."""
    row = Row("properties (hypothesis)")

    def counting(test):
        def counted(*args, **kwargs):
            row.tried += 1
            row.survived += 1
            test(*args, **kwargs)

        return counted

    for one in PROPERTIES:
        one.hypothesis.inner_test = counting(one.hypothesis.inner_test)
        try:
            settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )(one)()
        except AssertionError as error:
            row.survived -= 1
            row.complaints.append(f"{one.__name__}: {error} {getattr(error, '__notes__', '')}")
    return row
