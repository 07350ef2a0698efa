"""A tiny Qwen2.5-VL and the tiny student are the same model with attn_implementation="world2vlm" as with "eager".

Here CPU tensors take the reference; tests/test_kernels.py runs a part again under Triton's interpreter, where they take the kernels.
"""
import importlib

import numpy as np
import pytest
import torch
from conftest import load, tiny_qwen25, write_questions
from PIL import Image

sft, refine = load("04"), load("05")
ours_in_transformers = importlib.import_module("kernels.register")  # `kernels.register` is the function


@pytest.fixture(scope="module", params=["qwen2.5", "qwen3"])
def pair(request, run, tmp_path_factory):
    """The same student twice: (eager, world2vlm)."""
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "qwen2.5":
        return [tiny_qwen25(run, folder, attention) for attention in ("eager", "world2vlm")]
    return [sft.load_student(str(run / "4_base"), torch.float32, "cpu", attention, 10**6) for attention in ("eager", "world2vlm")]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Prompts with one, two and three pictures of different sizes, so of different lengths."""
    folder, draw, records = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for number, sizes in enumerate([[(84, 84)], [(28, 56), (84, 56)], [(56, 112), (28, 28), (84, 28)]]):
        paths = []
        for k, size in enumerate(sizes):
            paths.append(str(folder / f"{number}-{k}.png"))
            Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
        prompt = "<image>" * len(sizes) + "Which way did the camera turn?" * (number + 1)
        records.append({"images": paths, "messages": [{"role": "user", "content": prompt},
                                                      {"role": "assistant", "content": "turn left 40 degrees"}]})
    return records


def left_padded(student, questions):
    prompts = refine.open_prompts(student, questions)
    T = max(len(prompt["ids"]) for prompt in prompts)
    ids = torch.stack([torch.nn.functional.pad(p["ids"], (T - len(p["ids"]), 0), value=student.tokenizer.pad_token_id) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p["ids"]), (T - len(p["ids"]), 0)) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == student.model.config.image_token_id).int(),
            "pixel_values": torch.cat([p["pixels"] for p in prompts]), "image_grid_thw": torch.cat([p["grids"] for p in prompts])}


@torch.no_grad()
def test_logits_of_a_left_padded_batch(pair, questions):
    inputs = left_padded(pair[0], questions)
    eager, ours = (student.model(**inputs).logits[inputs["attention_mask"].bool()] for student in pair)
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens(pair, questions, cache):
    inputs = left_padded(pair[0], questions)
    eager, ours = (student.model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation=cache) for student in pair)
    assert torch.equal(ours, eager)


def test_our_own_generation(pair, questions):
    eager, ours = (refine.generate(student, refine.open_prompts(student, questions), 6) for student in pair)
    assert ours == eager


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_batch_with_shared_prefixes(pair, run, tmp_path, checkpointing):
    write_questions(tmp_path / "q.jsonl", tmp_path, scenes=2, per_scene=2)
    groups = sft.group_by_pictures(sft.read_questions(tmp_path / "q.jsonl", tmp_path), 16)
    found = []
    for student in pair:
        if checkpointing:
            student.model.activation_checkpointing_enable()
        student.model.train()
        (-sft.token_logprobs(student, sft.rows_of(student, groups, True, 10**6)).mean()).backward()
        found.append({name: p.grad for name, p in student.model.named_parameters() if p.grad is not None})
        student.model.zero_grad()
        student.model.activation_checkpointing_disable()
        student.model.eval()
    assert found[0].keys() == found[1].keys() and max(g.abs().max() for g in found[0].values()) > 1e-3
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-5, rtol=1e-3, msg=name)


def test_a_training_loss_in_bfloat16(pair, tmp_path):
    """Under autocast Qwen3-VL's q and k leave their norms in float32 and v its layer in bfloat16: they meet in bfloat16, as in SDPA."""
    write_questions(tmp_path / "q.jsonl", tmp_path, scenes=2, per_scene=2)
    groups = sft.group_by_pictures(sft.read_questions(tmp_path / "q.jsonl", tmp_path), 16)
    exact, near = [], []
    for student in pair:
        rows = sft.rows_of(student, groups, True, 10**6)
        with torch.no_grad():
            exact.append(sft.token_logprobs(student, rows))
        with torch.autocast("cpu", torch.bfloat16):
            near.append(sft.token_logprobs(student, rows))
        near[-1].mean().backward()
        assert all(p.grad.isfinite().all() for p in student.model.parameters() if p.grad is not None)
        student.model.zero_grad()
    eager, ours = ((one.detach() - exact[0]).abs().max() for one in near)
    assert 0 < ours < 2 * eager < 0.1


@torch.no_grad()
def test_the_vision_tower_calls_once_a_layer(pair, questions, monkeypatch):
    """Three prompts, six pictures, many windows: one launch a layer, with cu_seqlens."""
    launches, attention = [], ours_in_transformers.attention
    monkeypatch.setattr(ours_in_transformers, "attention", lambda *a, **k: launches.append(k["cu_seqlens"]) or attention(*a, **k))
    pair[1].model(**left_padded(pair[1], questions))
    config = pair[1].model.config
    assert sum(c is not None for c in launches) == config.vision_config.depth
    assert sum(c is None for c in launches) == config.text_config.num_hidden_layers
    assert max(len(c) - 1 for c in launches if c is not None) >= 6


def test_what_it_cannot_do_is_an_error():
    x = torch.zeros(1, 2, 3, 32)
    with pytest.raises(ValueError, match="prefix=segments"):
        ours_in_transformers.forward(torch.nn.Module(), x, x, x, torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="not both"):  # else the mask would quietly take the prefix's place
        ours_in_transformers.forward(torch.nn.Module(), x, x, x, torch.ones(1, 3), prefix=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no dropout"):
        ours_in_transformers.forward(torch.nn.Module(), x, x, x, None, dropout=0.1)


def test_the_patch_embedding_as_a_product_is_the_convolution(run, tmp_path):
    """Outputs and gradients, and a deep copy keeps weights of its own."""
    import copy
    for model in (sft.load_student(str(run / "4_base"), torch.float32, "cpu", "eager", 10**6).model, tiny_qwen25(run, tmp_path, "eager").model):
        proj = model.model.visual.patch_embed.proj
        plain = torch.nn.Conv3d(proj.in_channels, proj.out_channels, proj.kernel_size, stride=proj.stride, bias=proj.bias is not None)
        plain.load_state_dict(proj.state_dict())
        patches = torch.randn(50, proj.in_channels, *proj.kernel_size)
        got, want = proj(patches), plain(patches).flatten(1)
        assert torch.allclose(got, want, atol=1e-5)
        got.square().sum().backward(), want.square().sum().backward()
        assert torch.allclose(proj.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)
        twin = copy.deepcopy(proj)
        with torch.no_grad():
            proj.weight.zero_()
        assert torch.allclose(twin(patches), want, atol=1e-5)
