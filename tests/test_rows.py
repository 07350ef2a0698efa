"""kernels/rows.py and decode.py: shared prefixes, packing and generation are exact."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, student_of, write_questions
from PIL import Image

from kernels import rows as made
from kernels.generation import generate_groups, shared_heads
from kernels.rows import encode_question, micro_batches, pack, pad_rows, share

sft, refine = load("04"), load("05")
FAMILIES = pytest.mark.parametrize("family", ["qwen3", "qwen2.5", "qwen3.5"])
SHARING = pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])


def groups_of(run):
    return sft.group_by_pictures(sft.read_questions(run / "3_qa/sft.jsonl", run))


def rows_of(student, groups, shared=True, max_tokens=10**6):
    cfg = SimpleNamespace(share=shared, tokens=max_tokens, mean="token")
    return sum((sft.rows_of(student, group, cfg) for group in groups), [])


def logprobs(student, rows):
    return made.row_logprobs(student.model, rows, student.tokenizer.pad_token_id)


def gradients(student):
    found = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad()
    return found


def same(a, b, atol=1e-5):
    assert a.keys() == b.keys()
    assert max(g.abs().max() for g in a.values()) > 1e-3  # not a comparison of zeros
    for name in a:
        assert torch.allclose(a[name], b[name], atol=atol), name


def pictures(folder, sizes, draw):
    paths = []
    for k, size in enumerate(sizes):
        paths.append(str(folder / f"{len(sizes)}-{k}.png"))
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


# One, two and four pictures of different sizes in one batch: what public trainers got wrong.
SIZES = [[(84, 84)], [(28, 56), (84, 56)], [(56, 56), (28, 28), (84, 28), (56, 84)]]


def about(folder) -> list[dict]:
    """A question about each of SIZES, of different lengths."""
    draw, questions = np.random.default_rng(0), []
    for number, sizes in enumerate(SIZES):
        asks = "<image>" * len(sizes) + "Which way?" * (number + 1)
        answer = "turn left 40 degrees" + "; move forward 1 meters" * number
        messages = [{"role": "user", "content": asks}, {"role": "assistant", "content": answer}]
        paths = pictures(folder, sizes, draw)
        question = {"task_type": "A2", "name": str(number), "images": paths, "written": paths}
        questions.append(question | {"messages": messages})
    return questions


# --- shared prefixes ---


@SHARING
def test_shared_prefix_keeps_loss_and_gradients(run, tmp_path, family):
    student = student_of(run, tmp_path, family, "eager")
    shared, alone = (rows_of(student, groups_of(run), way) for way in (True, False))
    assert len(shared) == 12 and len(alone) == 36
    tokens = [sum(len(row["ids"]) for row in rows) for rows in (shared, alone)]
    assert tokens[0] < 0.6 * tokens[1]
    results = []
    for rows in (shared, alone):
        found = torch.cat([logprobs(student, [row]) for row in rows])
        (-found.mean()).backward()
        results.append((found.detach(), gradients(student)))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    same(results[0][1], results[1][1])


def test_questions_would_see_each_other_without_the_mask(run, tmp_path):
    """The same comparison fails when the segments are joined: the mask does the work."""
    student = student_of(run, tmp_path, attention="eager")
    rows = rows_of(student, groups_of(run)[:2])
    joined = [row | {"segment": torch.zeros_like(row["segment"])} for row in rows]
    assert (logprobs(student, rows) - logprobs(student, joined)).abs().max() > 1e-2


@FAMILIES
def test_positions_are_those_of_transformers(run, tmp_path, family):
    student = student_of(run, tmp_path, family, "eager")
    grids = torch.tensor([[1, 6, 6], [1, 2, 8], [1, 4, 2]])
    asks = {"role": "user", "content": "Look: <image><image> and <image> where is it?"}
    record = {"messages": [asks, {"role": "assistant", "content": "left"}]}
    encoded = encode_question(student, record, grids)
    types = (encoded["ids"] == student.model.config.image_token_id).int()[None]
    positions, _ = student.model.model.get_rope_index(
        encoded["ids"][None], mm_token_type_ids=types, image_grid_thw=grids
    )
    assert torch.equal(positions[:, 0], encoded["positions"])


def test_picture_tokens_in_a_text_are_refused_wherever_they_stand(run, tmp_path):
    student, grids = student_of(run, tmp_path), torch.tensor([[1, 2, 2]])
    for asks, answer in [("<image><|image_pad|>?", "no"), ("?", "<|image_pad|>")]:
        messages = [{"role": "user", "content": asks}, {"role": "assistant", "content": answer}]
        with pytest.raises(ValueError, match="picture tokens of its own"):
            encode_question(student, {"messages": messages}, grids)


def test_batched_logprobs_equal_those_of_each_alone(run, tmp_path):
    student, rows = student_of(run, tmp_path, attention="eager"), []
    for question in about(tmp_path):
        pixels, grids = sft.open_pictures(student, question["images"])
        encoded = encode_question(student, question, grids)
        rows += share([encoded], pixels, grids, student.model.config, 10**6)
    alone = torch.cat([logprobs(student, [row]) for row in rows])
    assert torch.allclose(logprobs(student, rows), alone, atol=1e-4)


# --- packing ---


def test_layers_with_a_state_read_every_question_alone(run, tmp_path, capsys):
    """In one padded pass and one by one as transformers reads them: the same log-probabilities."""
    student = student_of(run, tmp_path, "qwen3.5")
    assert capsys.readouterr().out.count("one by one, as padded rows") == 1
    rows = rows_of(student, groups_of(run)[:4])
    assert {len(row["questions"]) for row in rows} == {1} and len(rows) > 4
    found, expected = logprobs(student, rows), []
    for row in rows:
        ids = row["ids"][None]
        seen = {"pixel_values": row["pixels"], "image_grid_thw": row["grids"]}
        seen["mm_token_type_ids"] = (ids == student.model.config.image_token_id).int()
        told = student.model(input_ids=ids, **seen).logits[0].log_softmax(-1)
        expected.append(told[row["source"], row["ids"][row["target"]]])
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


@SHARING
def test_packed_equals_padded(run, tmp_path, family):
    """All groups in one row without padding, against rows padded to the longest under a mask."""
    results = []
    for attention in ("world2vlm", "eager"):
        student = student_of(run, tmp_path, family, attention)
        rows = rows_of(
            student, [group[: 1 + 2 * (k == 0)] for k, group in enumerate(groups_of(run)[:5])]
        )
        found = logprobs(student, rows)
        (-found.mean()).backward()
        results.append((found.detach(), gradients(student)))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    same(results[0][1], results[1][1])
    length = sum(len(row["ids"]) for row in rows)
    packed, padded = pack(rows)[0], pad_rows(rows, 0, torch.float32)[0]
    assert packed["input_ids"].shape == (1, length)
    assert padded["input_ids"].numel() > 1.05 * length


def test_a_group_over_the_budget_becomes_several_rows_with_the_same_answers(run, tmp_path):
    student, groups = student_of(run, tmp_path), groups_of(run)[:1]
    (whole,) = rows_of(student, groups)
    room = int((whole["segment"] <= 2).sum())  # the prefix and two questions
    cut = rows_of(student, groups, max_tokens=room)
    assert [len(row["questions"]) for row in cut] == [2, 1]
    assert all(len(row["ids"]) <= room for row in cut)
    assert torch.allclose(logprobs(student, cut), logprobs(student, [whole]), atol=1e-5)
    assert len(rows_of(student, groups, max_tokens=1)) == 3  # no room: one question per row


def test_micro_batches_hold_what_fits_and_lose_nothing():
    rows = [{"ids": torch.zeros(n)} for n in (5, 30, 12, 70, 12, 9)]
    for padded in (False, True):
        parts = micro_batches(rows, 42, padded, {})
        held = [len(row["ids"]) for part in parts for row in part]
        assert sorted(held) == [5, 9, 12, 12, 30, 70]
        for part in parts:
            lengths = [len(row["ids"]) for row in part]
            cost = len(part) * lengths[0] if padded else sum(lengths)
            assert cost <= 42 or len(part) == 1
    assert len(micro_batches(rows, 42, False, {})) < len(micro_batches(rows, 42, True, {}))


def test_logits_in_chunks_give_the_same_gradients(run, tmp_path, monkeypatch):
    student, found = student_of(run, tmp_path), []
    rows = rows_of(student, groups_of(run)[:4])
    vocabulary = student.model.config.text_config.vocab_size
    for logits in (2**27, 7 * vocabulary):  # all, or 7 answer tokens at a time
        monkeypatch.setattr(made, "LOGITS", logits)
        values = logprobs(student, rows)
        (-values.mean()).backward()
        found.append((values.detach(), gradients(student)))
    assert len(found[0][0]) > 40 and torch.allclose(found[0][0], found[1][0], atol=1e-5)
    same(found[0][1], found[1][1])


# --- generation ---


def never_generated(config) -> list[int]:
    return [config.image_token_id, config.video_token_id, config.vision_start_token_id]


@pytest.mark.parametrize("family", ["qwen3", "qwen3.5"])
def test_batched_generation_equals_transformers_generate(run, tmp_path, family):
    student = student_of(run, tmp_path, family, "eager")
    write_questions(tmp_path / "one.jsonl", tmp_path, scenes=3, pictures=1, per_scene=1, seed=5)
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:3]
    questions += refine.read_questions(tmp_path / "one.jsonl", tmp_path)
    prompts = [refine.open_prompt(student, one) for one in questions]
    for prompt, (response,) in zip(prompts, generate_groups(student, prompts, 12), strict=True):
        types = (prompt["ids"] == student.model.config.image_token_id).int()[None]
        theirs = student.model.generate(
            input_ids=prompt["ids"][None],
            attention_mask=torch.ones_like(types),
            mm_token_type_ids=types,
            pixel_values=prompt["pixels"],
            image_grid_thw=prompt["grids"],
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=never_generated(student.model.config),
        )
        assert response == theirs[0, len(prompt["ids"]) :].tolist()


def test_sampled_responses_follow_the_distribution_and_their_own_numbers(run, tmp_path):
    student = student_of(run, tmp_path, attention="eager")
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:2]
    prompts = [refine.open_prompt(student, one) for one in questions]
    uniforms = torch.rand(2 * 4000, 1, generator=torch.Generator().manual_seed(0))
    together = generate_groups(student, prompts, 1, 4000, uniforms)
    alone = generate_groups(student, prompts[1:], 1, 4000, uniforms[4000:])
    assert np.mean([a == b for a, b in zip(together[1], alone[0], strict=True)]) > 0.999
    out = student.model(
        input_ids=prompts[1]["ids"][None],
        position_ids=prompts[1]["positions"][:, None],
        pixel_values=prompts[1]["pixels"],
        image_grid_thw=prompts[1]["grids"],
    )
    expected = out.logits[0, -1].float().softmax(-1)
    counts = torch.bincount(torch.tensor(alone[0])[:, 0], minlength=len(expected)) / 4000
    assert (counts - expected).abs().max() < 0.03


def test_left_padded_generation_is_that_of_each_alone_and_of_the_update(run, tmp_path):
    """The tokens that come out have, in the packed rows of the update, the highest probability."""
    student = student_of(run, tmp_path)
    prompts = [refine.open_prompt(student, one) for one in about(tmp_path)]
    together = generate_groups(student, prompts, 6)
    assert together == [generate_groups(student, [prompt], 6)[0] for prompt in prompts]
    for prompt, tokens in zip(prompts, together, strict=True):
        prompt["tokens"] = tokens
    rows = refine.rows_of(student, prompts, torch.zeros(3, 1), 10**6)
    inputs, where, tokens = pack(rows)
    inputs["pixel_values"] = torch.cat([row["pixels"] for row in rows])
    inputs["image_grid_thw"] = torch.cat([row["grids"] for row in rows])
    logits = student.model(**inputs, use_cache=False).logits[0, where[1]]
    logits[:, never_generated(student.model.config)] = -torch.inf  # as in the rollout
    assert torch.equal(logits.argmax(-1), tokens)


def test_a_picture_token_in_a_response_never_reaches_the_model(run, tmp_path):
    student = student_of(run, tmp_path)
    head, pad = student.model.lm_head.weight, student.model.config.image_token_id
    with torch.no_grad():
        head[pad] += 10 * head.abs().max()  # the picture token is the likeliest by far
    prompts = [refine.open_prompt(student, refine.read_questions(run / "3_qa/grpo.jsonl", run)[0])]
    (responses,) = generate_groups(student, prompts, 5, 4, torch.rand(4, 5))
    assert all(pad not in response for response in responses)


@pytest.mark.parametrize(
    "head, tail, few, most",
    [(28, 40, 2, 16), (28, 150, 1, 4), (2000, 40, 18, 64)],
    ids=["small pictures", "long questions", "a video"],
)
def test_rows_are_as_wide_as_pays(head, tail, few, most):
    """A token meets all of its row: 64 long questions in one took nine times as long as in 32."""
    prompts, pixels = [], torch.zeros(1)
    for number in range(64):
        ids = torch.cat([torch.full((head,), 5), torch.full((tail,), 10 + number)])
        prompts.append({"ids": ids, "pixels": pixels})
    config = SimpleNamespace(image_token_id=1, get_text_config=lambda: None)
    widest = max(len(members) for members, _ in shared_heads(prompts, config))
    assert few <= widest <= most
