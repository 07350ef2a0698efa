"""A tiny Qwen2.5-VL and the tiny student: the same with "world2vlm" attention as with "eager".

Here CPU tensors take the reference; tests/test_kernels.py runs a part again under Triton's
interpreter, where they take the kernels.
"""

import copy
import importlib
import os

import numpy as np
import pytest
import torch
from conftest import load, tiny_qwen, write_questions
from PIL import Image

from kernels import generation, rows

sft = load("04")
register = importlib.import_module("kernels.register")  # `kernels.register` is the function
kernels = importlib.import_module("kernels.attention")


@pytest.fixture(scope="module", params=["qwen2.5", "qwen3"])
def pair(request, run, tmp_path_factory):
    """The same student twice: (eager, world2vlm)."""
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "qwen2.5":
        return [
            tiny_qwen(run, folder, attention, "qwen2.5") for attention in ("eager", "world2vlm")
        ]
    options = (str(run / "4_base"), torch.float32, "cpu")
    return [sft.load_student(*options, attention, 10**6) for attention in ("eager", "world2vlm")]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Prompts with one, two and three pictures of different sizes, so of different lengths."""
    folder, draw, records = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    all_sizes = [[(84, 84)], [(28, 56), (84, 56)], [(56, 112), (28, 28), (84, 28)]]
    for number, sizes in enumerate(all_sizes):
        paths = []
        for k, size in enumerate(sizes):
            paths.append(str(folder / f"{number}-{k}.png"))
            Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
        prompt = "<image>" * len(sizes) + "Which way did the camera turn?" * (number + 1)
        turns = [("user", prompt), ("assistant", "turn left 40 degrees")]
        messages = [{"role": role, "content": content} for role, content in turns]
        records.append({"images": paths, "messages": messages})
    return records


def prompts_of(student, questions, endings=("?", " now?")):
    """Prompts about each question's pictures, one for each ending."""
    prompts = []
    for question in questions:
        pixels, grids = sft.open_pictures(student, question["images"])
        asked, answer = question["messages"]
        for ending in endings:
            turns = [asked | {"content": asked["content"] + ending}, answer]
            encoded = rows.encode_question(student, question | {"messages": turns}, grids)
            n = encoded["prompt"]
            prompt = {"ids": encoded["ids"][:n], "positions": encoded["positions"][:, :n]}
            prompts.append(prompt | {"pixels": pixels, "grids": grids})
    return prompts


def left_padded(student, questions):
    """The model's inputs for a batch of prompts."""
    prompts = prompts_of(student, questions, ("?",))
    B, T = len(prompts), max(len(prompt["ids"]) for prompt in prompts)
    ids = torch.full((B, T), student.tokenizer.pad_token_id)
    mask, positions = torch.zeros(B, T, dtype=torch.long), torch.zeros(3, B, T, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        n = len(prompt["ids"])
        ids[b, -n:], mask[b, -n:], positions[:, b, -n:] = prompt["ids"], 1, prompt["positions"]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs["pixel_values"] = torch.cat([prompt["pixels"] for prompt in prompts])
    return inputs | {"image_grid_thw": torch.cat([prompt["grids"] for prompt in prompts])}


def rows_of(student, folder):
    """Two rows, each of two questions about the same pictures."""
    write_questions(folder / "q.jsonl", folder, scenes=2, per_scene=2)
    groups = {}
    for question in sft.read_questions(folder / "q.jsonl", folder):
        groups.setdefault(tuple(question["images"]), []).append(question)
    made = []
    for paths, group in groups.items():
        pixels, grids = sft.open_pictures(student, paths)
        encoded = [rows.encode_question(student, question, grids) for question in group]
        made += rows.share(encoded, pixels, grids, student.model.config, 10**6)
    assert [int(row["owner"].max()) + 1 for row in made] == [2, 2]
    return made


def logprobs(student, made, half=False):
    return rows.row_logprobs(student.model, made, student.tokenizer.pad_token_id, half=half)


@torch.no_grad()
def test_logits_of_a_left_padded_batch(pair, questions):
    inputs = left_padded(pair[0], questions)
    real = inputs["attention_mask"].bool()
    eager, ours = (student.model(**inputs).logits[real] for student in pair)
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens(pair, questions, cache):
    inputs = left_padded(pair[0], questions)
    del inputs["position_ids"]
    picture = pair[0].model.config.image_token_id
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == picture).int()
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    eager, ours = (student.model.generate(**inputs, **options) for student in pair)
    assert torch.equal(ours, eager)


def test_decoding_in_shared_rows(pair, questions):
    """Both attentions give the same tokens."""
    prompts = prompts_of(pair[0], questions)[:-1]  # rows of two, two and one
    assert len(generation.shared_heads(prompts, pair[0].model.config)) == 3
    eager, ours = (generation.generate(student, prompts, 6) for student in pair)
    assert ours == eager


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_batch_with_shared_prefixes(pair, tmp_path, checkpointing):
    found = []
    for student in pair:
        model = student.model
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        (-logprobs(student, rows_of(student, tmp_path)).mean()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(grads)
        model.zero_grad()
        model.activation_checkpointing_disable()
        model.eval()
    eager, ours = found
    assert eager.keys() == ours.keys() and max(g.abs().max() for g in eager.values()) > 1e-3
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name], atol=1e-5, rtol=1e-3, msg=name)


def test_a_training_loss_in_bfloat16(pair, tmp_path):
    """Under autocast Qwen3-VL's q and k leave their norms in float32, and v its layer in bfloat16.

    They meet in bfloat16, as in SDPA.
    """
    errors = []
    for student in pair:
        made = rows_of(student, tmp_path)
        with torch.no_grad():
            exact = logprobs(student, made)
        near = logprobs(student, made, half=True)
        near.mean().backward()
        grads = [p.grad for p in student.model.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
        student.model.zero_grad()
        errors.append((near.detach() - exact).abs().max())
    eager, ours = errors
    assert 0 < ours < 2 * eager < 0.1


def counting(monkeypatch):
    """(prefixes that the attention is given, arguments of `prefix_ranges`) from here on."""
    given, found = [], []
    attention, ranges = register.attention, kernels.prefix_ranges

    def recorded(*tensors, **options):
        given.append(options["prefix"])
        return attention(*tensors, **options)

    def counted(*arguments):
        found.append(arguments)
        return ranges(*arguments)

    monkeypatch.setattr(register, "attention", recorded)
    monkeypatch.setattr(kernels, "prefix_ranges", counted)
    return given, found


@torch.no_grad()
def test_once_per_pass_is_found_what_the_kernels_may_skip(pair, questions, monkeypatch):
    """All layers of a forward pass are given the same segments; a decoded token is a pass."""
    student, passes = pair[1], 5  # heads, tails, and three tokens
    given, found = counting(monkeypatch)
    monkeypatch.setattr(generation, "end_tokens", lambda student: [-1])
    generation.generate(student, prompts_of(student, questions), 3)
    layers = student.model.config.text_config.num_hidden_layers
    segments = [prefix for prefix in given if prefix is not None]
    assert len(segments) == passes * layers
    assert len({id(prefix) for prefix in segments}) == passes
    assert len(found) == (passes if os.environ.get("TRITON_INTERPRET") == "1" else 0)


def test_a_checkpointed_step_of_packed_rows_shares_its_segments(pair, tmp_path, monkeypatch):
    """Layers that are computed again for the backward pass included."""
    model = pair[1].model
    model.activation_checkpointing_enable()
    model.train()
    given, _ = counting(monkeypatch)
    logprobs(pair[1], rows_of(pair[1], tmp_path)).sum().backward()
    model.activation_checkpointing_disable()
    model.eval()
    model.zero_grad()
    segments = [prefix for prefix in given if prefix is not None]
    assert len(segments) == 2 * model.config.text_config.num_hidden_layers
    assert len({id(prefix) for prefix in segments}) == 1
    assert segments[0].ranges is segments[0].ranges


@torch.no_grad()
def test_the_vision_tower_calls_once_a_layer(pair, questions, monkeypatch):
    """Three prompts, six pictures, many windows: one launch per layer, with cu_seqlens."""
    launches, attention = [], register.attention

    def counted(*tensors, **options):
        launches.append(options["cu_seqlens"])
        return attention(*tensors, **options)

    monkeypatch.setattr(register, "attention", counted)
    pair[1].model(**left_padded(pair[1], questions))
    config = pair[1].model.config
    windows = [cu_seqlens for cu_seqlens in launches if cu_seqlens is not None]
    assert len(windows) == config.vision_config.depth
    assert len(launches) - len(windows) == config.text_config.num_hidden_layers
    assert max(len(cu_seqlens) - 1 for cu_seqlens in windows) >= 6


@torch.no_grad()
def test_packed_rows_reach_the_language_model_only(pair, tmp_path, monkeypatch):
    """text_cu_seqlens is not taken for the tower's, and a plain cu_seqlens is refused."""
    made, launches, attention = rows_of(pair[1], tmp_path), [], register.attention

    def counted(*tensors, **options):
        launches.append((options["causal"], options["cu_seqlens"].tolist()))
        return attention(*tensors, **options)

    monkeypatch.setattr(register, "attention", counted)
    logprobs(pair[1], made)
    lengths = [len(row["ids"]) for row in made]
    starts = [0, lengths[0], sum(lengths)]
    text = pair[1].model.config.text_config
    assert [where for causal, where in launches if causal] == [starts] * text.num_hidden_layers
    patches = sum(len(row["pixels"]) for row in made)
    assert {where[-1] for causal, where in launches if not causal} == {patches}
    inputs, _, _ = rows.pack(made)
    inputs["cu_seqlens"] = inputs.pop("text_cu_seqlens")
    with pytest.raises(ValueError, match="text_cu_seqlens"):
        pair[1].model.model(**inputs)


def test_what_it_cannot_do_is_an_error():
    x, module = torch.zeros(1, 2, 3, 32), torch.nn.Module()
    with pytest.raises(ValueError, match="prefix=segments"):
        register.forward(module, x, x, x, torch.zeros(1, 1, 3, 3))
    # Otherwise the mask would quietly take the prefix's place.
    mask = register.padding_mask(1, 3, 3, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="not both"):
        register.forward(module, x, x, x, mask, prefix=torch.zeros(1, 3))
    alone = kernels.Segments(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="do not fit"):
        kernels.attention(x, x, x, causal=True, scale=1.0, cu_seqlens=[0, 3], prefix=alone)
    with pytest.raises(ValueError, match="no dropout"):
        register.forward(module, x, x, x, None, dropout=0.1)


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_the_patch_embedding_as_a_product_is_the_convolution(run, tmp_path, family):
    """Outputs and gradients, and a deep copy keeps weights of its own."""
    if family == "qwen2.5":
        student = tiny_qwen(run, tmp_path, "eager", "qwen2.5")
    else:
        student = sft.load_student(str(run / "4_base"), torch.float32, "cpu", "eager", 10**6)
    proj = student.model.model.visual.patch_embed.proj
    sizes = (proj.in_channels, proj.out_channels, proj.kernel_size)
    plain = torch.nn.Conv3d(*sizes, stride=proj.stride, bias=proj.bias is not None)
    plain.load_state_dict(proj.state_dict())
    patches = torch.randn(50, proj.in_channels, *proj.kernel_size)
    got, want = proj(patches), plain(patches).flatten(1)
    assert torch.allclose(got, want, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(proj.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)
    twin = copy.deepcopy(proj)
    with torch.no_grad():
        proj.weight.zero_()
    assert torch.allclose(twin(patches), want, atol=1e-5)
