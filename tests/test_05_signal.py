"""What stage 5 learns from: baselines, scales, rewards and groups, beside slow references."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load
from hypothesis import given
from hypothesis import strategies as st
from kernels.generation import generate_groups

refine = load("05")
GRID = {"meters": (0.2, 1.6), "degrees": (5.0, 40.0)}
REWARDS = torch.tensor([[1.0, 0.5, 0.5, 0.2], [0.8, 0.8, 0.8, 0.801], [0.0, 1.0, 1.0, 1.0]])
GREEDY = torch.tensor([0.5, 0.8, 1.0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", [None, GREEDY])
def test_advantages_are_those_of_a_loop_in_float64(baseline, scale):
    centred = [[r - np.mean(own) for r in own] for own in REWARDS.double().tolist()]
    batch = np.sqrt(np.mean(np.square(centred)))
    expected = []
    for own in REWARDS.double().tolist():
        spread = {"group": np.std(own, ddof=1) + 1e-4, "batch": batch + 1e-4, "none": 1}[scale]
        base = np.mean(own) if baseline is None else float(baseline[len(expected)])
        expected.append([(r - base) / spread for r in own])
    found = refine.advantages(REWARDS, baseline, scale)
    assert np.allclose(found, expected, atol=2e-4)


def test_a_copy_of_the_greedy_answer_is_not_reinforced():
    assert (refine.advantages(REWARDS, GREEDY, "batch")[GREEDY[:, None] == REWARDS] == 0).all()
    assert (refine.advantages(REWARDS, None, "batch")[2, 1:] > 0).all()


def test_a_near_miss_is_blown_up_by_its_own_spread_alone():
    """Seven of 0.800 and one of 0.801: as much as right beside wrong, where a group divides."""
    near = torch.tensor([[0.8] * 7 + [0.801], [0.0] * 4 + [1.0] * 4])
    assert refine.advantages(near)[0].max() > 1.9
    for scale in ("batch", "none"):
        gains = refine.advantages(near, None, scale)
        assert gains[0].max() < 0.003 * gains[1].max()


def test_groups_are_kept_by_their_outcome():
    outcomes = [True, False], [True, True], [False, False]
    assert [refine.keep_group(right, 0) for right in outcomes] == [True, True, True]
    assert [refine.keep_group(right, 2) for right in outcomes] == [True, False, False]


@pytest.mark.parametrize("refills,asked,kept", [(0, 2, 2), (1, 4, 1), (2, 6, 2), (3, 6, 2)])
def test_groups_are_replaced_until_there_are_enough(monkeypatch, refills, asked, kept):
    """Of the first two rollouts one group is partly right, of the third another one."""
    outcomes = iter([(1, 0), (1, 1), (0, 0), (0, 0), (0, 1), (1, 1), (1, 0), (1, 0)])

    def roll_out(student, prompts, step, grid, cfg):
        for prompt in prompts:
            prompt["right"] = [bool(one) for one in next(outcomes)]

    monkeypatch.setattr(refine, "roll_out", roll_out)
    cfg = SimpleNamespace(refills=refills, prompts=2, group=2)
    plan = iter([[{"name": "a"}, {"name": "b"}] for _ in range(1 + refills)])
    learned, everything = refine.ask(None, plan, 0, GRID, cfg)
    assert (len(everything), len(learned)) == (asked, kept)
    assert next(plan, None) is None  # the next step begins with its own


MOVE = st.builds(
    "move {} {} meters".format,
    st.sampled_from(["forward", "backward", "left", "right"]),
    st.sampled_from([0.4, 0.8, 1.2, 1.6]),
)
TURN = st.builds(
    "turn {} {} degrees".format,
    st.sampled_from(["left", "right"]),
    st.integers(1, 4).map((10).__mul__),
)
ACTIONS = st.lists(MOVE | TURN, min_size=1, max_size=3).map("; ".join)
BOX = st.lists(st.integers(0, 1000), min_size=4, max_size=4).map(str)


@given(st.sampled_from(["A1", "A2", "A3", "D1", "D3", "A4"]), st.data())
def test_the_grid_reward_is_bounded_and_pays_all_for_the_answer_alone(task, data):
    said = {"A1": MOVE, "A2": TURN, "D1": BOX, "A4": st.sampled_from(["true", "false"])}
    said = said.get(task, ACTIONS)
    answer, response = data.draw(said), data.draw(said | st.just("no idea"))
    question = {"task_type": task, "messages": [{"content": answer}]}
    paid = {}
    for kind in ("grid", "published"):
        paid[kind], right = refine.judge(
            question, GRID, SimpleNamespace(reward=kind), response, False
        )
    assert -1e-9 <= paid["grid"] <= paid["published"] + 1e-9 <= 1 + 2e-9
    if task != "D1":
        assert right == (refine.canonical(response) == refine.canonical(answer))
        assert right == (paid["grid"] > 1 - 1e-9)
    listed = f"{response}; {answer}"  # it cannot be gamed by saying more
    more, _ = refine.judge(question, GRID, SimpleNamespace(reward="grid"), listed, False)
    assert more < 1 or refine.canonical(listed) == refine.canonical(answer)


def test_where_the_published_reward_is_flat_the_grid_reward_is_not():
    question = {"task_type": "A1", "messages": [{"content": "move left 0.8 meters"}]}
    said = [f"move left {meters} meters" for meters in (0.8, 1.2, 1.6)]
    paid = {}
    for kind in ("published", "grid"):
        how = SimpleNamespace(reward=kind)
        paid[kind] = [refine.judge(question, GRID, how, text, False)[0] for text in said]
    assert paid["published"][:2] == [1, 1]
    assert paid["grid"][0] == 1 and paid["grid"][1] < 0.75 and paid["grid"][2] < paid["grid"][1]


def test_the_likeliest_response_of_a_group_costs_one_row_and_changes_no_draw(run):
    student = refine.load_student(
        str(run / "4_base"), torch.float32, "cpu", refine.ATTENTION, 10**6
    )
    said = []
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:3]
    for baseline in ("group", "greedy"):
        prompts = [refine.open_prompt(student, one) for one in questions]
        cfg = refine.Config(group=4, max_new_tokens=8, baseline=baseline)
        refine.roll_out(student, prompts, 0, GRID, cfg)
        said.append([prompt["tokens"] for prompt in prompts])
        assert all(len(prompt["scores"]) == len(prompt["cut"]) == 4 for prompt in prompts)
    assert said[0] == said[1]
    likeliest = generate_groups(student, prompts, 8)
    texts = [student.tokenizer.decode(own[0], skip_special_tokens=True) for own in likeliest]
    assert [prompt["greedy_text"] for prompt in prompts] == texts


def test_the_grid_is_that_of_the_answers():
    said = ["turn left 10 degrees; move forward 0.4 meters", "move left 1.6 meters", "[1, 2, 3, 4]"]
    said += ["turn right 40 degrees", "move left 0.8 meters", "yes", "turn left 20 degrees"]
    grid = refine.grid_of([{"messages": [{"content": text}]} for text in said])
    assert grid == {"meters": (0.2, 1.6), "degrees": (5.0, 40.0)}
