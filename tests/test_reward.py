"""The reward: the published one for one well-formed answer, less for all that games it."""

import json
import math
import re
from pathlib import Path

import pytest
from conftest import load

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "open_g4_reward.jsonl"

stage = load("06")


def paid(task: str, answer, response) -> float:
    return stage.reward(task, answer, response)["overall"]


HONEST = {
    "A1": "move forward 1.2 meters",
    "A2": "turn left 40 degrees",
    "A3": "turn right 30 degrees; move forward 1 meters",
    "A4": "true",
    "D1": "[412, 300, 530, 611]",
    "D2": "no",
    "D3": "move left 0.8 meters; turn left 20 degrees",
    "D4": "yes",
    "S1": "[10, 20, 300, 400]",
    "S2": "yes",
    "S3": "2.3 meters",
    "S5": "[10, 20, 300, 400]",
    "S6": "no",
    "E1": "turn left 35 degrees",
    "E2": "ahead",
    "E3": "C",
}


@pytest.mark.parametrize("task", HONEST)
def test_honest_answer_is_paid_in_full(task):
    answer = HONEST[task]
    for response in (answer, answer.upper(), f"  {answer}\n", answer.replace(" ", "  ")):
        assert paid(task, answer, response) == pytest.approx(1, abs=1e-12), response


# What counts as ONE well-formed answer here is decided without the reward's own grammar.
MOVE = r"(?:move\s+(?:forward|backward|left|right)\s+\d+(?:\.\d+)?\s+meters?"
MOVE += r"|turn\s+(?:left|right)\s+\d+(?:\.\d+)?\s+degrees?)"
BETWEEN = r"(?:\s*[,;]\s*(?:then\s+)?|\s+then\s+|\s+and\s+)"
BOX = r"(?:bbox\s*)?\[\s*-?\d+(?:\.\d+)?\s*(?:,\s*-?\d+(?:\.\d+)?\s*){3}\]"
WELL_FORMED = {
    **dict.fromkeys(("A1", "A2"), MOVE + r"\s*[.!]?"),
    **dict.fromkeys(("A3", "D3"), MOVE + f"(?:{BETWEEN}{MOVE})*" + r"\s*[.!]?"),
    "D1": BOX,
    **dict.fromkeys(("A4", "D2", "D4"), r"(?:yes|no|true|false)\s*[.!]?"),
}
TRUTH = WELL_FORMED | dict.fromkeys(
    ("A1", "A2"), WELL_FORMED["A3"]
)  # some true answers of A1 there hold several actions
COUNTS = {
    "A1": 39,
    "A2": 25,
    "A3": 49,
    "D3": 58,
    "D1": 243,
    "A4": 34,
    "D2": 26,
    "D4": 36,
}  # lines that match
LINES = (1441, 1291)  # 150 lines are paid less here


def golden_lines():
    """(task, answer, response, published score) of the lines whose true answer has both keys."""
    for line in GOLDEN.read_text().splitlines():
        record = json.loads(line)
        try:
            truth = json.loads(record["ground_truth"] or "")
            yield truth["task_type"].strip(), truth["answer"], record["response"], record["score"]
        except (ValueError, TypeError, KeyError):
            continue


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"golden data absent: {GOLDEN}")
def test_equals_the_published_reward_on_every_well_formed_answer():
    count = dict.fromkeys(WELL_FORMED, 0)
    for task, answer, response, score in golden_lines():
        if (
            task in WELL_FORMED
            and isinstance(response, str)
            and re.fullmatch(TRUTH[task], str(answer).strip(), re.I)
            and re.fullmatch(WELL_FORMED[task], response.strip(), re.I)
            and len(response.strip()) <= 200
        ):
            got = stage.reward(task, answer, response)
            assert set(got) == set(score), (task, answer, response)
            assert all(abs(got[part] - value) < 1e-9 for part, value in score.items()), (
                task,
                answer,
                response,
                got,
                score,
            )
            count[task] += 1
    assert count == COUNTS, count


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"golden data absent: {GOLDEN}")
def test_never_pays_more_than_the_published_reward():
    lines = list(golden_lines())
    equal = sum(
        abs(paid(task, answer, response) - score["overall"]) < 1e-9
        for task, answer, response, score in lines
    )
    assert all(
        paid(task, answer, response) <= score["overall"] + 1e-9
        for task, answer, response, score in lines
    )
    assert (
        len(lines),
        equal,
    ) == LINES  # the rest: several actions or boxes, "remove forward", units outside the grammar


GAMED = [
    ("A1", "move forward 1.2 meters", response)
    for response in (
        "; ".join(f"move {way} 1.2 meters" for way in ("forward", "backward", "left", "right")),
        "move forward 1.2 meters, move forward 0.4 meters",
        "move forward 1.2 meters move forward 1.2 meters",
        "move forward 1.2 meters or move left 1.2 meters",
        "move left 1.2 meters; move forward 1.2 meters",
        "remove forward 1.2 meters",
        "removes forward 1.2 meters",
        "_move forward 1.2 meters",
        "not move forward 1.2 meters",
        "move forward 1.2 meters or 2",
        "move forward 1.2 meters 3.4 meters",
        "move forward 1.2-2.4 meters",
        "move forward backward left right 1.2 meters",
        "forward backward left right move forward 1.2 meters",
        "move forward 1.2 meters, forward 3 meters",
        "move forward 1.2 meters, moved left 3 m",
        "move forward 1.2 meters. turn",
        "1. move forward 1.2 meters 2. move left 1.2 meters",
        "it did not move forward 1.2 meters",
        "don't move forward 1.2 meters",
        "move forward 1.2 meters, yes no",
        "move forward 1.2 metersmove left 1 meters",
        "move forward 1.2meterstick",
    )
]
GAMED += [
    ("A2", "turn right 165 degrees", response)
    for response in (
        "return right 165 degrees",
        "turn right 165 degrees; turn left 165 degrees",
        "turn left 165 degrees, turn right 165 degrees",
        "turn right 165 degrees, turn right 100 degrees",
        "overturn right 165 degrees",
        "turn right 165 degrees\nturn right 165 degrees",
        "<answer>RETURN RIGHT 165  DEGREES",
        "turn right 10 degrees turn right 90 degrees turn right 165 degrees",
    )
]
PAIR = "turn right 30 degrees; move forward 1 meters"
GAMED += [
    (task, PAIR, response)
    for task in ("A3", "D3")
    for response in (
        f"{PAIR}; turn right 40 degrees; move forward 2 meters",
        f"{PAIR}; {PAIR}",
        "turn right 30 degrees; turn left 30 degrees; move forward 1 meters",
        "return right 30 degrees; remove forward 1 meters",
        "turn right 30 degrees; move forward 1 meters or move left 1 meters",
        "turn right 30 degrees; move forward 1 meters; move",
        "turn right 30 degrees; remove forward 1 meters",
        "move forward 1 meters; turn right 30 degrees",
    )
]
GAMED += [
    (task, "[412, 300, 530, 611]", response)
    for task in ("D1", "S1")
    for response in (
        "[412, 300, 530, 611] [0, 0, 100, 100]",
        "[412, 300, 530, 611] [412, 300, 530, 611]",
        "[0, 0, 1000, 1000]",
        "[412, 300, 530, 611, 5]",
        "[412, 300, 530]",
        "[412, 300, 530, 611] or [0, 0, 1, 1]",
        "the box is [412, 300, 530, 611]",
        "[412, 300, 530, 611] 1 2 3 4",
        "(0, 0, 10, 10) [412, 300, 530, 611]",
        "412, 300, 530, 611",
        "[530, 611, 412, 300]",
        "[-99999, -99999, 99999, 99999]",
        "[412, 300, 530, 611] not",
    )
]
GAMED += [
    (task, "yes", response)
    for task in ("A4", "D2", "D4", "S2")
    for response in (
        "yes no",
        "no yes",
        "yes, no",
        "yes/no",
        "yes or no",
        "yes yes",
        "true false",
        "yesno",
        "not yes",
        "yes it is",
        "maybe yes",
        "y",
    )
]
GAMED += [
    ("S3", "2.3 meters", response)
    for response in (
        "2.3 meters 5 meters",
        "1 meters, 2.3 meters",
        "2.3 degrees",
        "about 2-3 meters",
    )
]
GAMED += [
    ("E2", "left", response)
    for response in (
        "left right",
        "left or right",
        "leftright",
        "not left",
        "right",
        "behind, left",
    )
]
GAMED += [
    ("E3", "B", response)
    for response in (
        "A B",
        "A, B",
        "B or C",
        "B/C",
        "BC",
        "B B",
        "B. C",
        "B. A. B",
        "(B)(C)",
        "not B",
        "A. B. C. D.",
        "the answer is B",
        "1",
        "image 3",
    )
]


@pytest.mark.parametrize("task, answer, response", GAMED)
def test_gaming_pays_less_than_the_honest_answer(task, answer, response):
    assert -1 <= paid(task, answer, response) < paid(task, answer, answer) == pytest.approx(1)


@pytest.mark.parametrize(
    "task, right, wrong",
    [
        ("A1", "move forward 1 meters", "move backward 3 meters"),
        ("D4", "yes", "no"),
        ("A2", "turn left 40 degrees", "turn right 90 degrees"),
        ("D1", "[412, 300, 530, 611]", "[700, 700, 701, 701]"),
        ("E3", "B", "C"),
        ("E2", "left", "right"),
    ],
)
def test_hedging_pays_less_even_than_an_honest_wrong_answer(task, right, wrong):
    for hedge in (f"{right} {wrong}", f"{wrong}, {right}", f"{right} or {wrong}"):
        assert paid(task, right, hedge) < paid(task, right, wrong)


@pytest.mark.parametrize("task", HONEST)
@pytest.mark.parametrize(
    "frame",
    [
        "Answer: {}",
        "I think {}.",
        "{} x x x x",
        "<answer>{}</answer>",
        "**{}**",
        "1. {}",
        "{} and so on",
        "{} is my answer",
        "zzzz {}",
        '"{}"',
        "The camera should {}",
        "{}\n\n{}",
        "not {}",
        "{} or so",
    ],
)
def test_more_text_never_pays_more(task, frame):
    truth = HONEST[task]
    others = {
        "A1": ["move left 1 meters"],
        "A2": ["turn right 10 degrees"],
        "A3": ["turn right 50 degrees; move left 2 meters"],
        "D3": ["turn right 50 degrees; move left 2 meters"],
        "D1": ["[400, 320, 600, 700]", "[1, 2, 3, 4]"],
        "S3": ["5 meters"],
    }
    for alone in [truth] + others.get(task, []):
        if frame == "{}\n\n{}" and task in ("A3", "D3") and alone != truth:
            continue  # a longer sequence is another answer there, with the published price
        assert paid(task, truth, frame.format(alone, alone)) <= paid(task, truth, alone) + 1e-12


def test_closer_pays_more():
    def falls(values):
        return values == sorted(values, reverse=True) and values[0] > values[-1]

    assert falls(
        [paid("A1", "move left 1 meters", f"move left {v / 10:g} meters") for v in range(10, 80)]
    )
    assert falls(
        [paid("A2", "turn left 10 degrees", f"turn left {v} degrees") for v in range(10, 180, 5)]
    )
    then, far = "; move left 1 meters", range(10, 180, 5)
    turns = [f"turn left {v} degrees{then}" for v in far]
    assert falls([paid("A3", turns[0], turn) for turn in turns])
    boxes = [f"[{100 + v}, 100, {300 + v}, 300]" for v in range(0, 700, 20)]
    assert falls([paid("D1", boxes[0], box) for box in boxes])
    assert falls([paid("S3", "1 meters", f"{v / 10:g} meters") for v in range(10, 80)])
    around = [f"{(350 + v) % 360} degrees" for v in range(0, 180, 10)]  # the circle
    degrees = [stage.reward(None, "350 degrees", said, "degrees")["overall"] for said in around]
    assert falls(degrees)
    wide = (f"{v} degrees" for v in (10, 330, 90))
    same, other, worse = (stage.reward(None, "350 degrees", v, "degrees")["overall"] for v in wide)
    assert same == other > worse


def test_values_from_the_equations():
    half_way = pytest.approx(0.45 + 0.55 * 0.5)  # 2.75 m, 47.5 degrees
    assert paid("A1", "move left 1 meters", "move left 3.75 meters") == half_way
    assert paid("A2", "turn left 5 degrees", "turn left 52.5 degrees") == half_way
    assert paid("A2", "turn left 5 degrees", "turn right 5 degrees") == pytest.approx(0.10)
    one, two = "move left 1 meters", "move left 1 meters; turn left 5 degrees"
    first_missing = "turn left 5 degrees; move left 1 meters"
    assert paid("A3", first_missing, one) == pytest.approx(0.10 + 0.25 / 2)
    assert paid("A3", one, two) == pytest.approx(0.10 + 0.125 + 0.65 - 0.03)
    assert paid("D2", "yes", "no") == pytest.approx(0.20)
    box, size_right = "[0, 0, 100, 100]", "[900, 900, 1000, 1000]"
    assert paid("D1", box, size_right) == pytest.approx(0.35 + 0.65 * 0.15)
    assert paid("D1", box, f"box: {box}") == pytest.approx(1 - 0.2 * 0.6)
    assert stage.reward("A1", one, one) == {"overall": 1, "format": 1, "action": 1, "numeric": 1}


def test_bounds_and_strange_input():
    strange = [
        None,
        5,
        5.0,
        True,
        b"yes",
        [],
        {},
        "",
        " ",
        "\0",
        "\ud800",
        "é" * 150,
        "x" * 201,
        "9" * 199,
        "[" * 150,
        "[9" * 60,
        f"move left {'9' * 180} meters",
        f"[{'9' * 60}, -{'9' * 60}, 0, {'9' * 60}]",
        "move left ٣ meters",
        "[nan, inf, 0, 1]",
        f"{'9' * 190} meters",
        "\u202eyes",
        "move left 1e9 meters",
        "move  left  0  meters",
        "yes" + " " * 500,
    ]
    for task in [*HONEST, "Z9", None, 7, [], "a1", " A1 "]:
        for answer in strange + [HONEST.get(task if isinstance(task, str) else "", "yes")]:
            for response in strange:
                got = stage.reward(task, answer, response)
                assert all(
                    isinstance(value, float) and math.isfinite(value) for value in got.values()
                )
                assert got["overall"] == -1 or 0 <= got["overall"] <= 1, (task, answer, response)
    assert paid("A4", "yes", "y" * 201) == -1 and paid("A4", "yes", "yes" + " " * 500) == 1
    assert paid("A1", "move left 1 meters", "move left 1 meters" + " x" * 92) == -1
    assert (
        paid("note", "a lamp", "A lamp.") == 1 and paid("note", "a lamp", "a table") == 0
    )  # any other task: the same text


def test_parsers():
    text, actions = "Turn right 30 degrees, then MOVE LEFT 0.8 meter.", [("turn_right", 30.0)]
    assert stage.parse_actions(text) == [*actions, ("shift_left", 0.8)]
    assert stage.parse_actions("move forward 1 meters") == [("forward", 1.0)]
    assert (
        stage.parse_actions("nothing")
        is stage.parse_actions("")
        is stage.parse_actions(None)
        is None
    )
    assert stage.parse_box("bbox [1, -2.5, 3, 4]") == ([1, -2.5, 3, 4], True)
    assert stage.parse_box("at [1, 2, 3, 4].") == ([1, 2, 3, 4], False)
    assert stage.parse_box("[1, 2, 3, 4][1, 2, 3, 4]") is None
    texts = {"Yes.": True, "FALSE": False, "true ?": True, "yes no": None, None: None}
    assert {text: stage.YES_NO.get(stage.canonical(text)) for text in texts} == texts
    assert stage.parse_quantity("2.3 Meters.", "meters") == 2.3
    assert stage.parse_quantity("-5", "degrees") == -5
    assert stage.parse_quantity("2 degrees", "meters") is None


OPTIONS = ["turn left 40 degrees", "turn left 70 degrees", "first move left 1 meters, then", "B"]


def choose(response, truth="B", options=OPTIONS):
    return stage.reward("A2", truth, response, "choice", options)["overall"]


def test_a_choice_is_one_letter_alone_or_before_its_own_option():
    for said in ("B", "b", "B.", "(B)", "(b).", " B \n", "B)", "B:"):
        assert choose(said) == choose(said, options=None) == pytest.approx(1)
    for said in (
        "B. turn left 70 degrees",
        "(b) Turn left  70 degrees.",
        "B: turn left 70 degrees",
    ):
        assert choose(said) == pytest.approx(1)
    assert choose("A. turn left 40 degrees") == choose("C") == pytest.approx(0.2)  # one, but wrong
    # text of another option, of two, or a letter that is none of the options' or no letter at all
    texts = [
        "B. turn left 40 degrees",
        "B. turn left 70 degrees or A",
        "E",
        "Z",
        "turn left 70 degrees",
    ]
    texts += [
        "A B",
        "AB",
        "A and B",
        "B. A",
        "A. turn left 70 degrees",
        "B. B",
        "D. B. B",
        "yes",
        "",
    ]
    assert not any(map(choose, texts))
    assert choose("D. B", truth="D") == pytest.approx(1)  # where that is its option
    assert choose("B. turn left 70 degrees", options=None) == 0  # what it says is not known
    for options in ([], [1, None], "AB", 5, {}):
        assert 0 <= choose("B", options=options) <= 1
