"""The public benchmarks in 06: scorers against golden data, data sets in their published layouts,
bad rows, shared prefill, shards."""

import io
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch, load, script, tiny_qwen
from PIL import Image
from test_06_eval import evaluate, write

from kernels import generation
from kernels.student import cut_frames

HERE = Path(__file__).parent / "golden"
evaluation = load("06")


def golden(name: str) -> list[dict]:
    path = HERE / f"open_g5_{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- scorers


def test_vsi_scores_equal_the_public_ones():
    for item in golden("vsibench_items"):
        kind, said, truth = item["question_type"], item["prediction"], item["ground_truth"]
        direct = evaluation.score_vsi(kind, said, truth)
        by_command = evaluation.score_vsi(kind, evaluation.without_thoughts(said), truth)
        want = item["score_direct"], item["score_cli"]
        assert (direct, by_command) == pytest.approx(want, abs=1e-9), item


@pytest.mark.parametrize(
    "said, left",
    [
        ("so it is 7</think> 3", "3"),  # where the prompt opened the thoughts
        ("<think>7</think>\n3", "3"),
        ("a</think>b<think>c</think> 3", "b 3"),
        ("</analysis>3</analysis> 4", "4"),
        ("<think>7", "<think>7"),
        ("<think>7</analysis>3", "3"),
    ],
)
def test_thoughts_are_cut_off_as_lmms_eval_does(said, left):
    assert evaluation.without_thoughts(said) == left


def vsi_run() -> tuple[list[str], np.ndarray]:
    kinds, scores = [], []
    for item in golden("vsibench_run"):
        said = evaluation.without_thoughts(item["prediction"])
        kinds.append(item["question_type"])
        scores.append(evaluation.score_vsi(kinds[-1], said, item["ground_truth"]))
    return kinds, np.array(scores)


def test_vsi_aggregate_of_a_whole_run():
    kinds, scores = vsi_run()
    weights = evaluation.weights_of([{"task_type": kind} for kind in kinds])
    want = golden("aggregates")[0]["subscores_unrounded"]
    assert len(want) == 9
    for key, value in want.items():
        category = key.removesuffix("_accuracy").removesuffix("_MRA:.5:.95:.05")
        of = np.array([category == "overall" or kind.startswith(category) for kind in kinds])
        got = (scores * weights)[of].sum() / weights[of].sum()
        assert got == pytest.approx(value, abs=1e-9), key


def test_intervals_of_vsi_take_the_mean_of_categories():
    kinds, scores = vsi_run()
    scenes = [f"scene {i % 60}" for i in range(len(kinds))]
    weights = evaluation.weights_of([{"task_type": kind} for kind in kinds])
    got = evaluation.estimate(scores, scenes, 0, weights=weights)
    overall = golden("aggregates")[0]["subscores_unrounded"]["overall"]
    assert got["mean"] == pytest.approx(overall, abs=1e-6)
    assert got["low"] < got["mean"] < got["high"] < got["low"] + 0.15


def test_mindcube_equals_the_public_evaluator():
    for item in golden("mindcube_items"):
        assert evaluation.extract_choice(item["answer"]) == item["extracted"], item
        assert evaluation.setting_of(item["id"]) == item["setting_official"]
    want, left_out = (
        golden("aggregates")[1]["official"],
        evaluation.EXAMS["mindcube"]["not_counted"],
    )
    right = {}
    for item in golden("mindcube_run"):
        if item["gt_answer"]:
            correct = evaluation.extract_choice(item["answer"]) == item["gt_answer"]
            right.setdefault(evaluation.setting_of(item["id"]), []).append(correct)
    for setting, values in want["settings"].items():
        own = right.get(setting, [])
        assert (len(own), sum(own)) == (values["total"], values["gen_cogmap_correct"])
        if own:
            assert np.mean(own) == pytest.approx(values["gen_cogmap_accuracy"], abs=1e-9)
    counted = np.concatenate([own for setting, own in right.items() if setting not in left_out])
    assert counted.mean() == pytest.approx(want["gen_cogmap_accuracy"], abs=1e-9)


def test_sat_equals_both_public_scorers():
    items, run, want = golden("sat_items"), golden("sat_run"), golden("aggregates")[2]
    for item in items + run:
        said, options = item["response"], item["answers"]
        assert evaluation.score_sat(said, options, item["correct_answer"]) == item["mj_score"], item
        assert evaluation.sat_letter(said, item["question"]) == item["lmms_filtered"], item
        sample = {"task_type": item["question_type"], "options": options}
        sample |= {"truth": item["lmms_target"], "question": item["question"]}
        got = evaluation.score_choice("sat letter", sample, said)
        assert got["score"] == item["lmms_score"], item
    scores = {}
    for item in run:
        score = evaluation.score_sat(item["response"], item["answers"], item["correct_answer"])
        scores.setdefault(item["question_type"], []).append(score)
    assert np.mean(sum(scores.values(), [])) == pytest.approx(want["mj_all"], abs=1e-9)
    for kind, value in want["mj_types"].items():
        assert np.mean(scores[kind]) == pytest.approx(value, abs=1e-9)


def sat_synthesized() -> set[int]:
    bits = np.frombuffer(evaluation.base64.b64decode(evaluation.SAT_SYNTHESIZED), np.uint8)
    return set(np.flatnonzero(np.unpackbits(bits)).tolist())


def test_the_published_subset_of_sat():
    path = HERE / "sat_subsets.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    assert sat_synthesized() == set(json.loads(path.read_text())["val_rows"])


# --- data sets in their published layouts


def picture(number: int, side: int = 40) -> bytes:
    content, draw = io.BytesIO(), np.random.default_rng(number)
    pixels = draw.integers(0, 256, (side, side + 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_video(path: Path, frames: int, side: int = 56):
    """Frame i is flat grey of brightness 2 i + 10: a test can tell which frames were taken."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(frames):
            grey = np.full((side, side, 3), 2 * i + 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


def sat_row(number: int, **changes) -> dict:
    answers = ["rotated left", "rotated right"]
    pictures = [{"bytes": picture(number + k), "path": None} for k in range(1 + number % 2)]
    row = {"image_bytes": pictures, "question": f"Which way, {number}?", "answers": answers}
    row["correct_answer"] = answers[number % 3 > 0]
    row["question_type"] = ("ego_movement", "obj_movement")[number % 2]
    return row | changes


def write_sat(folder: Path, rows: list[dict], name: str = "SAT_test.parquet") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    encoded = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    texts = [(name, pa.string()) for name in ("question", "question_type", "correct_answer")]
    texts += [("correct_answer_idx", pa.int64())] * any("correct_answer_idx" in row for row in rows)
    schema = pa.schema([("image_bytes", encoded), ("answers", pa.list_(pa.string())), *texts])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / name, row_group_size=4)
    return folder


def vsi_row(id: int, scene: str, kind: str, truth: str, options: list[str] | None = None) -> dict:
    row = {"id": id, "dataset": "scannet", "scene_name": scene, "question_type": kind}
    return row | {"question": f"Question {id}?", "options": options, "ground_truth": truth}


def write_vsi(folder: Path, scenes: int = 2, a_video: int = 18, frames: int = 40) -> Path:
    rows = []
    for scene in range(scenes):
        write_video(folder / f"scannet/scene{scene}.mp4", frames + scene)
        for k in range(a_video):
            kind, type = list(evaluation.VSI_TYPES.items())[k % 10]
            truth, options = ("AB"[k % 2], ["A. lamp", "B. sofa"])
            if type == "number":
                truth, options = str(1 + k), None
            rows.append(vsi_row(len(rows), f"scene{scene}", kind, truth, options))
    write(folder / "test.jsonl", rows)
    return folder


def write_mindcube(folder: Path, rows: int = 6) -> Path:
    records = []
    for number in range(rows):
        images = [f"other_all_image/among/scene{number // 2}/{k}.png" for k in range(2)]
        for image in images:
            (folder / "data" / image).parent.mkdir(parents=True, exist_ok=True)
            (folder / "data" / image).write_bytes(picture(number // 2 + len(image)))
        name = ("among_group", "around_group", "translation_group")[number % 3]
        text = f"Where is the lamp, {number}? A. Above B. Under C. Left"
        row = {"id": f"{name}{number:03d}_q1", "question": text, "images": images}
        records.append(row | {"gt_answer": "ABC"[number % 3]})
    write(folder / "data/raw/MindCube_tinybench.jsonl", records)
    return folder


def take(run: Path, data: Path, name: str, says, monkeypatch, **settings) -> dict:
    """Ask a benchmark of `says(question, blank) -> response`; its results."""
    (run / "student").mkdir(parents=True, exist_ok=True)
    usual = {"benchmark": name, "data": str(data), "tag": "x", "batch": 64}
    return evaluate(run, monkeypatch, says, **(usual | settings))


def right(question, blank):
    return "C." if blank else question["truth"]


def samples_of(run: Path, tag: str = "x") -> list[dict]:
    samples = (run / "6_eval" / tag / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in samples]


def score(results: dict, task: str = "all") -> dict:
    return results["tasks"][task]["metrics"]["score"]


def skips(results: dict) -> dict:
    counts = results["counts"].items()
    return {key.removeprefix("skipped, "): n for key, n in counts if key.startswith("skipped, ")}


@pytest.fixture
def two_frames(monkeypatch):
    monkeypatch.setitem(evaluation.EXAMS["vsibench-multiimage"], "frames", 2)


def test_sat_real_end_to_end(tmp_path, monkeypatch, capsys):
    rows = [sat_row(i) for i in range(9)]
    rows[2]["image_bytes"][0]["bytes"] = b"no picture"
    rows[4] = sat_row(4, question=None)
    rows[5] = sat_row(5, correct_answer="neither")
    data = write_sat(tmp_path / "sat", rows)
    results = take(tmp_path, data, "sat-real-mindjourney", right, monkeypatch)
    assert results["questions"] == 6 and skips(results) == {"unusable row": 3}
    assert results["right"]["mean"] == 1 and score(results)["blank"]["mean"] == 0
    assert score(results)["constant"]["mean"] == pytest.approx(4 / 6, abs=1e-6)
    out = capsys.readouterr()
    assert "skipped, unusable row" in out.out
    told = [line for line in out.err.splitlines() if "skipped" in line]
    assert len(told) == 1 and "3 questions skipped, unusable row: first question 2" in told[0]
    samples = samples_of(tmp_path)
    keys = {"number", "id", "task_type", "question", "images", "truth", "response", "scores"}
    assert keys <= set(samples[0])
    assert {"seconds", "prompt_tokens", "tokens"} <= set(samples[0]["cost"])
    for sample in samples:  # MindJourney's middle square
        sizes = [Image.open(tmp_path / image).size for image in sample["images"]]
        assert sizes == [(512, 512)] * (1 + sample["number"] % 2)


def test_sat_synthesized_takes_the_published_rows_and_letters(tmp_path, monkeypatch):
    """Letters where the protocol asks for them; the file is shorter than the published one."""
    data = write_sat(tmp_path / "sat", [sat_row(i) for i in range(40)], "SAT_val.parquet")
    kept = sorted(row for row in sat_synthesized() if row < 40)
    usual = {"pictures": "shown"}
    results = take(tmp_path, data, "sat-synthesized", right, monkeypatch, **usual)
    samples = samples_of(tmp_path)
    assert [sample["group"] for sample in samples[::2]] == kept and score(results)["mean"] == 1
    assert {sample["truth"] for sample in samples} == {"A", "B"}
    assert skips(results) == {"missing row": 500 - len(kept)}


def first_right(number: int) -> dict:
    """A row as published: the right choice is the first one."""
    answers = [f"{word} {number}" for word in ("near", "far", "left", "right")][: 2 + number % 3]
    return sat_row(number, answers=answers, correct_answer=answers[0])


def test_whoever_repeats_a_position_is_found_out(tmp_path, monkeypatch, capsys):
    """The published order pays "always first" in full; asked in all orders it is worth nothing."""
    data = write_sat(tmp_path / "sat", [first_right(i) for i in range(12)])

    def parrot(question, blank):
        return question["options"][0] if "order" in question and len(question["truth"]) > 1 else "A"

    published = take(tmp_path, data, "sat-real-mindjourney", parrot, monkeypatch, tag="published")
    assert score(published)["mean"] == score(published)["first"]["mean"] == 1
    assert score(published)["last"]["mean"] == 0
    assert "always first" in capsys.readouterr().out
    circular = take(tmp_path, data, "sat-real", parrot, monkeypatch, tag="circular")
    metrics = circular["tasks"]["all"]["metrics"]
    chance = np.mean([1 / (2 + i % 3) for i in range(12)])
    assert score(circular)["mean"] == score(circular)["first"]["mean"] == pytest.approx(chance)
    assert metrics["circular"]["mean"] == metrics["circular"]["first"]["mean"] == 0
    assert circular["right"]["mean"] == 0 and circular["questions"] == 4 * (2 + 3 + 4)
    orders = {sample["id"]: sample["order"] for sample in samples_of(tmp_path, "circular")}
    assert (
        sorted(orders["2/0"]) == [0, 1, 2, 3]
        and orders["2/1"] == orders["2/0"][1:] + orders["2/0"][:1]
    )
    firsts = [orders[f"{i}/0"][0] for i in range(12)]
    assert set(firsts) != {0}  # a hash has chosen where the orders begin
    knows = take(tmp_path, data, "sat-real", right, monkeypatch, tag="knows")
    assert knows["tasks"]["all"]["metrics"]["circular"]["mean"] == 1


def test_sat_of_the_hub_keeps_its_order(tmp_path, monkeypatch):
    """nv-njb/SAT: the right choice by its place."""
    rows = [sat_row(i, correct_answer_idx=i % 2) for i in range(4)]
    data = write_sat(tmp_path / "sat", rows, "test-00000-of-00001.parquet")
    take(tmp_path, data, "sat-nvidia", right, monkeypatch)
    assert [sample["truth"] for sample in samples_of(tmp_path)] == ["A", "B", "A", "B"]


def refused(run, data, name, monkeypatch, **settings):
    with pytest.raises(SystemExit) as ended:
        take(run, data, name, right, monkeypatch, **settings)
    assert ended.value.code == 2


def test_a_broken_parquet_file_is_refused(tmp_path, monkeypatch, capsys):
    import pyarrow.parquet as pq

    data = write_sat(tmp_path / "sat", [sat_row(i) for i in range(12)])
    path = data / "SAT_test.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)  # the pictures of rows 4 to 7
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    for broken in (bytes(content), b"PAR1 and nothing else"):
        path.write_bytes(broken)
        refused(tmp_path, data, "sat-real", monkeypatch)
        assert "fetch it again" in capsys.readouterr().err


def test_vsi_bench_end_to_end(tmp_path, monkeypatch, capsys):
    data = write_vsi(tmp_path / "vsi", scenes=2, a_video=20)
    bad = [("absent", "object_counting", "3"), ("scene0", "riddle", "3")]
    bad += [("broken", "object_counting", "3"), ("broken", "room_size_estimation", "3")]
    bad += [("scene0", "object_counting", "none"), ("../../secret", "object_counting", "3")]
    rows = (data / "test.jsonl").read_text().splitlines()
    rows += [vsi_row(90 + i, *row) for i, row in enumerate(bad)]
    write(data / "test.jsonl", [*rows, '{"half'])
    whole = (data / "scannet/scene1.mp4").read_bytes()
    (data / "scannet/broken.mp4").write_bytes(whole[:300])
    (tmp_path / "secret.mp4").write_bytes(whole)
    monkeypatch.setitem(evaluation.EXAMS["vsibench-multiimage"], "frames", 8)
    results = take(tmp_path, data, "vsibench-multiimage", right, monkeypatch)
    assert results["questions"] == 40 and results["skipped"] == 7
    want = {"unusable row": 3, "missing file": 1, "malformed line": 1, "unreadable video": 2}
    assert skips(results) == want
    assert score(results)["mean"] == 1 and score(results)["constant"]["mean"] < 1
    first = [Image.open(tmp_path / image) for image in samples_of(tmp_path)[0]["images"]]
    levels = [np.asarray(frame.convert("L")).mean() for frame in first]
    assert np.allclose(levels, 2 * np.linspace(0, 39, 8).astype(int) + 10, atol=3)
    out = capsys.readouterr()
    assert "skipped, unusable row" in out.out and "absent.mp4 is missing" in out.err
    told = [line for line in out.err.splitlines() if " questions skipped, " in line]
    assert len(told) == 4  # one per kind of fault


def test_rows_of_wrong_types_are_counted(tmp_path, monkeypatch, two_frames):
    vsi = write_vsi(tmp_path / "vsi", scenes=1, a_video=4)
    row, rows = vsi_row(90, "scene0", "object_counting", "3"), (vsi / "test.jsonl").read_text()
    bad = [row | {"options": 5}, row | {"scene_name": "a\0b"}, row | {"scene_name": "x" * 5000}]
    write(vsi / "test.jsonl", [*rows.splitlines(), *bad, row | {"question_type": ["x"]}])
    results = take(tmp_path / "a", vsi, "vsibench-multiimage", right, monkeypatch, pictures="shown")
    assert results["questions"] == 4
    assert sum(skips(results).values()) == 4
    cube = write_mindcube(tmp_path / "cube")
    path = cube / "data/raw/MindCube_tinybench.jsonl"
    rows = path.read_text().splitlines()
    bad = [json.loads(rows[0]) | {"images": images} for images in (["a\0b"], ["x" * 5000], [])]
    write(path, [*rows, *bad])
    results = take(tmp_path / "b", cube, "mindcube", right, monkeypatch, pictures="shown")
    assert sum(skips(results).values()) == 3


def test_the_choice_of_questions_does_not_depend_on_the_place(tmp_path, monkeypatch):
    chosen = []
    for run in (tmp_path / "here", tmp_path / "there"):
        data = write_mindcube(run / "cube", rows=30)
        take(run, data, "mindcube", right, monkeypatch, pictures="shown", per_task=3)
        chosen.append([sample["number"] for sample in samples_of(run)])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 9


def test_a_picture_that_comes_back_is_asked_about(tmp_path, monkeypatch):
    """If no picture can be read the run ends in a line; later the same command answers all."""
    data = write_mindcube(tmp_path / "cube", rows=6)
    folder = data / "data/other_all_image"
    pictures = {path: path.read_bytes() for path in folder.rglob("*.png")}
    for path in pictures:
        path.write_text("no picture")
    refused(tmp_path, data, "mindcube", monkeypatch, pictures="shown")
    for path, content in pictures.items():
        path.write_bytes(content)
    results = take(tmp_path, data, "mindcube", right, monkeypatch, pictures="shown")
    assert results["questions"] == 6 and results["skipped"] == 0


def test_mindcube_end_to_end(tmp_path, monkeypatch):
    data = write_mindcube(tmp_path / "cube")
    path = data / "data/raw/MindCube_tinybench.jsonl"
    rows = path.read_text().splitlines()
    first = json.loads(rows[0])
    bad = [{"id": "among_q9", "gt_answer": None}, {"id": "other_q9", "images": ["no.png"]}]
    write(path, [*rows, *(first | one for one in bad)])

    def says(question, blank):
        lost = question["task_type"] == "translation"
        return "no idea" if lost else f"<answer>{question['truth']}. x</answer>"

    results = take(tmp_path, data, "mindcube", says, monkeypatch)
    assert results["questions"] == 6 and score(results)["mean"] == 1  # without translation
    assert score(results, "translation")["mean"] == 0
    assert results["tasks"]["translation"]["unparsable"] == 2
    assert skips(results) == {"unusable row": 1, "missing file": 1}
    lmms = results["tasks"]["all"]["metrics"]["lmms"]["mean"]  # leaves out no setting
    assert lmms == pytest.approx(4 / 6, abs=1e-6)
    take(tmp_path, data, "mindcube", says, monkeypatch, tag="again")
    evaluation.main(evaluation.Config(run=str(tmp_path), compare=["x", "again"]))
    tasks = json.loads((tmp_path / "6_eval/compare_x_again.json").read_text())["tasks"]
    assert tasks["all"]["n"] == 6 and tasks["among"]["score"]["above_a"]["mean"] == 0


def test_words_of_the_protocols(tmp_path, monkeypatch, two_frames):
    """The published words, as they reach the student."""
    read, folders = {}, {"sat": write_sat(tmp_path / "sat", [sat_row(1)])}
    folders["vsibench"] = write_vsi(tmp_path / "vsi", 1, 10, 3)
    folders["mindcube"] = write_mindcube(tmp_path / "cube", 1)
    for name in ("sat-real", "sat-real-mindjourney", "vsibench-multiimage", "mindcube"):
        exam, kind = evaluation.EXAMS[name], name.split("-")[0]
        path = evaluation.find_file(folders[kind], exam["file"])
        questions = evaluation.READERS[kind](exam, path, tmp_path, evaluation.defaultdict(list))
        words = [question["record"]["messages"][-2]["content"] for question in questions]
        read[name] = words
    choice, number = read["vsibench-multiimage"][0], read["vsibench-multiimage"][6]
    frames = "<image><image>These are frames of a video.\n"
    assert choice == frames + (
        "Question 0?\nOptions:\nA. lamp\nB. sofa\n"
        "Answer with the option's letter from the given choices directly."
    )
    words = "Please answer the question using a single word or phrase."
    assert number == f"{frames}Question 6?\n{words}"
    assert read["sat-real-mindjourney"] == [
        "These are the images that pair with the question.\n\nImage 1:\n<image>\n"
        "Image 2:\n<image>\n\nImage 1 is your current egocentric view\n\n"
        "Question: Which way, 1?\n\nAnswer Choices:\nrotated left\nrotated right\n\n"
        "Output the exact answer from the choices.\nAnswer: \n"
    ]
    end = "Only output the letter of the correct option and nothing else."
    both = [("rotated left", "rotated right"), ("rotated right", "rotated left")]
    both = [f"A. {a}\nB. {b}\n\n{end}" for a, b in both]
    assert [words[-len(both[0]) :] for words in sorted(read["sat-real"])] == sorted(both)
    (words,), end = read["mindcube"], "Where is the lamp, 0? A. Above B. Under C. Left"
    assert words.startswith("<image><image>[Task]\n") and words.endswith(f"[Question]\n{end}")


@pytest.mark.parametrize(
    "settings",
    [
        {"benchmark": "vsi"},
        {"benchmark": "vsibench-multiimage"},
        {"benchmark": "mindcube", "data": "no/such/folder"},
        {"benchmark": "vsibench", "data": "."},
        {"benchmark": "mindcube", "data": "."},
        {"benchmark": "sat-real", "data": "."},
        {"benchmark": "vsibench-multiimage", "data": "."},
        {"shard": "1"},
    ],
)
def test_wrong_settings_are_one_line(tmp_path, settings, capsys):
    (tmp_path / "student").mkdir()
    settings = settings | ({"data": str(tmp_path)} if settings.get("data") == "." else {})
    with pytest.raises(SystemExit) as ended:
        evaluation.main(evaluation.Config(run=str(tmp_path), checkpoint="student", **settings))
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# --- layouts


def cached(data: Path, cache: Path) -> Path:
    """The files of `data` as the hub's cache has them: links to blobs, in a snapshot's folders."""
    for number, path in enumerate(sorted(data.rglob("*.*"))):
        if path.is_file():
            link = cache / "snapshots/0a1b2c" / path.relative_to(data)
            blob = cache / f"blobs/{number:040d}"
            for folder in (link.parent, blob.parent):
                folder.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link.symlink_to(blob)
    return cache


@pytest.mark.parametrize("name", ["sat-real", "vsibench-multiimage", "mindcube"])
def test_the_cache_of_the_hub_is_read(tmp_path, monkeypatch, two_frames, name):
    write = {"sat": lambda folder: write_sat(folder, [sat_row(i) for i in range(4)])}
    write |= {"vsibench": lambda folder: write_vsi(folder, 1, 4, 4), "mindcube": write_mindcube}
    data = write[name.split("-")[0]](tmp_path / "data")
    cache = cached(data, tmp_path / "datasets--owner--name")
    plain = take(tmp_path / "a", data, name, right, monkeypatch, pictures="shown")
    linked = take(tmp_path / "b", cache, name, right, monkeypatch, pictures="shown")
    assert plain["questions"] == linked["questions"] > 3 and skips(linked) == {}
    assert plain["right"] == linked["right"]


@pytest.mark.parametrize("name", ["vsibench-multiimage", "mindcube"])
def test_published_zips_are_unpacked_once(tmp_path, monkeypatch, two_frames, name):
    """VSI-Bench: a zip of videos beside the rows; MindCube: one with all that there is."""
    vsi = name.startswith("vsi")
    data = write_vsi(tmp_path / "data", 1, 4, 4) if vsi else write_mindcube(tmp_path / "data")
    plain = take(tmp_path / "a", data, name, right, monkeypatch, pictures="shown")
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    part = "scannet" if vsi else data.name
    shutil.make_archive(zipped / part, "zip", data if vsi else tmp_path, part)
    if vsi:
        shutil.copy(data / "test.jsonl", zipped)
    for number in range(2):  # the second time they lie there
        out = tmp_path / f"b{number}"
        unpacked = take(out, zipped, name, right, monkeypatch, pictures="shown")
        assert plain["questions"] == unpacked["questions"] > 3 and skips(unpacked) == {}
        assert plain["right"] == unpacked["right"]
    (zipped / f"{part}.unpacked").unlink()
    whole = (zipped / f"{part}.zip").read_bytes()
    middle = len(whole) // 2
    for broken in (whole[:-30], whole[:middle] + b"x" * 99 + whole[middle + 99 :], b"no zip"):
        (zipped / f"{part}.zip").write_bytes(broken)
        command = ("--run", tmp_path / "c", "--checkpoint", "a/b", "--benchmark", name)
        ended = script("06", *command, "--data", zipped, check=False)
        assert ended.returncode == 2 and len(ended.stderr.strip().splitlines()) == 1
        assert f"{part}.zip does not unpack" in ended.stderr


def test_linked_folders_are_read_and_rows_do_not_lead_out(tmp_path, monkeypatch, two_frames):
    elsewhere, data = write_vsi(tmp_path / "disk", 1, 4, 4), tmp_path / "data"
    data.mkdir()
    (data / "scannet").symlink_to(elsewhere / "scannet")
    rows = [json.loads(line) for line in (elsewhere / "test.jsonl").read_text().splitlines()]
    out = [rows[0] | {"scene_name": "../../disk/scannet/scene0"}]
    out += [rows[0] | {"dataset": str(elsewhere / "scannet"), "scene_name": "scene0"}]
    write(data / "test.jsonl", [*rows, *out])
    results = take(tmp_path, data, "vsibench-multiimage", right, monkeypatch)
    assert results["questions"] == 4 and skips(results) == {"unusable row": 2}


# --- categories


def test_the_eight_categories_stand_in_the_table(tmp_path, monkeypatch, two_frames):
    data = write_vsi(tmp_path / "vsi", scenes=2, a_video=10)

    def says(question, blank):
        return question["truth"] if question["task_type"].endswith("_easy") else "Z"

    results = take(tmp_path, data, "vsibench-multiimage", says, monkeypatch)
    tasks = results["tasks"].keys() - {"all"}
    eight = {evaluation.category(kind) for kind in evaluation.VSI_TYPES}
    assert len(eight) == 8 and eight <= tasks
    direction = score(results, "object_rel_direction")["mean"]
    assert direction == pytest.approx(1 / 3, abs=1e-6)  # the mean of its three difficulties
    assert score(results)["mean"] == pytest.approx(1 / 24, abs=1e-6)  # the mean of the eight


# --- other engines


def said_by_engines(questions: list[dict]) -> dict[str, list[dict]]:
    """The same answers as three engines write them."""
    lines = {"hand": [], "batch": [], "samples": []}
    for number, one in enumerate(questions):
        id, said = one["custom_id"], "ABC"[number % 3]
        body = {"choices": [{"message": {"content": said}}], "usage": {"completion_tokens": 2}}
        lines["hand"].append({"id": id, "response": said, "seconds": 0.5})
        lines["batch"].append({"custom_id": id, "response": {"status_code": 200, "body": body}})
        sample = {"doc_id": number, "doc": {"id": id}, "resps": [[f"<think>D.</think>{said}"]]}
        lines["samples"].append(sample | {"filtered_resps": [said]})
    return lines


def test_an_exam_goes_out_and_answers_come_back(tmp_path, monkeypatch, capsys):
    """The same number as for our own student with the same answers, from three formats."""
    data, out = write_mindcube(tmp_path / "cube", rows=9), tmp_path / "exam.jsonl"
    usual = {"run": str(tmp_path), "benchmark": "mindcube", "data": str(data)}
    evaluation.main(evaluation.Config(**usual, checkpoint="own/model", questions_out=str(out)))
    questions = [json.loads(line) for line in out.read_text().splitlines()]
    content = questions[0]["body"]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert len(urls) == 2 and all(Path(url.removeprefix("file://")).is_file() for url in urls)
    assert not (tmp_path / "6_eval/model-mindcube").exists()
    own = {one["custom_id"]: "ABC"[number % 3] for number, one in enumerate(questions)}

    def says(question, blank):
        return own[question["id"]]

    want = take(tmp_path, data, "mindcube", says, monkeypatch, tag="own", pictures="shown")
    for name, lines in said_by_engines(questions).items():
        path = tmp_path / f"{name}.jsonl"
        write(path, [*lines, {"id": "unknown", "response": "A"}, {"id": "?"}, '{"half'])
        evaluation.main(evaluation.Config(**usual, answers=str(path)))
        results = json.loads((tmp_path / f"6_eval/{name}-mindcube/results.json").read_text())
        metrics = results["tasks"]["all"]["metrics"]
        assert metrics["lmms"] == want["tasks"]["all"]["metrics"]["lmms"]
        if name != "samples":  # whose thoughts MindCube's own code scores
            assert metrics["score"] == want["tasks"]["all"]["metrics"]["score"]
        assert results["questions"] == 9 and results["cost"]["peak_gb"] is None
        assert results["cost"]["seconds"] == (0.5 if name == "hand" else None)
    write(tmp_path / "few.jsonl", said_by_engines(questions)["hand"][:4])
    evaluation.main(evaluation.Config(**usual, answers=str(tmp_path / "few.jsonl")))
    results = json.loads((tmp_path / "6_eval/few-mindcube/results.json").read_text())
    assert results["questions"] == 9 and skips(results) == {"without an answer (wrong)": 5}
    assert results["right"]["mean"] < want["right"]["mean"]
    write(tmp_path / "none.jsonl", [{"id": "x", "response": "A"}])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        evaluation.main(evaluation.Config(**usual, answers=str(tmp_path / "none.jsonl")))
    assert ended.value.code == 2 and "--questions_out" in capsys.readouterr().err


def test_frames_left_half_written_by_a_kill_are_cut_again(tmp_path):
    """Also where the next process has the same number, as in a container."""
    write_video(tmp_path / "film.mp4", 12)
    left = tmp_path / f"4.{os.getpid()}.part"
    left.mkdir()
    (left / "000.png").write_bytes(b"half")
    cut_frames(str(tmp_path / "film.mp4"), tmp_path / "4", 4)
    assert len([Image.open(path).load() for path in (tmp_path / "4").iterdir()]) == 4
    assert not left.exists()


def test_a_video_exam_is_for_other_engines(tmp_path):
    data, out = write_vsi(tmp_path / "vsi", 1, 2, 4), tmp_path / "exam.jsonl"
    usual = {"run": str(tmp_path), "benchmark": "vsibench", "data": str(data)}
    evaluation.main(evaluation.Config(**usual, questions_out=str(out)))
    (first, _) = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = [part["type"] for part in first["body"]["messages"][1]["content"]]
    assert kinds == ["video_url", "text"] and first["custom_id"] == "0"
    write(tmp_path / "said.jsonl", [{"id": i, "response": "A"} for i in range(2)])
    evaluation.main(evaluation.Config(**usual, answers=str(tmp_path / "said.jsonl")))
    results = json.loads((tmp_path / "6_eval/said-vsibench/results.json").read_text())
    assert results["questions"] == 2 and results["right"]["mean"] == 0.5


# --- resume and shards


def without_times(run: Path, tag: str) -> tuple:
    results = json.loads((run / "6_eval" / tag / "results.json").read_text())
    results = {key: results[key] for key in results.keys() - {"tag", "config", "cost", "batch"}}
    return [sample | {"cost": 0} for sample in samples_of(run, tag)], results


def test_shards_of_different_batches_cover_the_benchmark(tmp_path, monkeypatch):
    data = write_mindcube(tmp_path / "cube", rows=30)
    usual = {"pictures": "shown", "shard": "0/2", "batch": 4}
    assert take(tmp_path, data, "mindcube", right, monkeypatch, **usual) == {}
    usual |= {"shard": "1/2", "batch": 3}
    assert take(tmp_path, data, "mindcube", right, monkeypatch, **usual)["questions"] == 30


def test_two_shards_equal_one_and_a_killed_run_goes_on(tmp_path, monkeypatch, capsys, two_frames):
    data = write_vsi(tmp_path / "vsi", scenes=4, a_video=10)

    def says(question, blank):
        return question["truth"] if question["number"] % 3 else "B"

    def ask(tag, says=says, **more):
        return take(
            tmp_path, data, "vsibench-multiimage", says, monkeypatch, tag=tag, batch=10, **more
        )

    ask("whole")
    assert not ask("shards", shard="1/2")
    assert "20 answers of others are missing" in capsys.readouterr().out
    assert ask("shards", shard="0/2")
    assert "missing" not in capsys.readouterr().out
    assert without_times(tmp_path, "shards") == without_times(tmp_path, "whole")
    assert not list((tmp_path / "6_eval/shards").glob("*of*"))

    def killed(question, blank):
        if question["number"] >= 20:
            raise KeyboardInterrupt
        return says(question, blank)

    with pytest.raises(KeyboardInterrupt):
        ask("killed", killed)
    log = tmp_path / "6_eval/killed/samples.jsonl"
    assert [sample["number"] for sample in samples_of(tmp_path, "killed")] == list(range(20))
    log.write_bytes(log.read_bytes()[:-30])  # the last line is half there
    asked = []
    ask("killed", lambda q, blank: asked.append(q["number"]) or says(q, blank))
    assert sorted(set(asked)) == list(range(19, 40))
    assert without_times(tmp_path, "killed") == without_times(tmp_path, "whole")


def test_a_tiny_student_killed_resumed_one_by_one_and_in_shards(run, tmp_path):
    """The real model: 2 x 7 questions in one run, in two shards one by one, by two processes of
    torchrun, and killed in the middle: the same answers and results."""
    data, folder = write_mindcube(tmp_path / "cube", rows=14), tmp_path / "run"
    folder.mkdir()
    (folder / "student").symlink_to(run / "4_base")
    usual = {"run": str(folder), "checkpoint": "student", "benchmark": "mindcube"}
    usual |= {"data": str(data), "max_new_tokens": 4}
    evaluation.main(evaluation.Config(**usual, tag="whole"))
    for shard in ("0/2", "1/2"):
        evaluation.main(evaluation.Config(**usual, tag="shards", shard=shard, batch=1))
    assert without_times(folder, "shards") == without_times(folder, "whole")
    flags = [part for key, value in usual.items() for part in (f"--{key}", value)]
    script("06", *flags, "--tag", "processes", processes=2)
    assert without_times(folder, "processes") == without_times(folder, "whole")
    log = folder / "6_eval/killed/samples.jsonl"
    process = launch("06", *flags, "--tag", "killed", "--batch", 1)
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (log.parent / "results.json").is_file()
    assert 1 <= len(log.read_text().splitlines()) < 14
    evaluation.main(evaluation.Config(**usual, tag="killed"))
    assert without_times(folder, "killed") == without_times(folder, "whole")


# --- one prefill for the questions about the same pictures


def answers(student, questions: list[dict], tokens: int) -> list[list[int]]:
    prompts = evaluation.prompts_of(student, questions, False)
    return evaluation.generate(student, prompts, tokens)


@pytest.fixture(scope="module")
def eighteen(run, tmp_path_factory):
    """The tiny student of `run` and a video with 18 questions, as prompts of 32 frames."""
    folder = tmp_path_factory.mktemp("video")
    data = write_vsi(folder / "vsi", scenes=1, a_video=18, frames=64)
    exam = evaluation.EXAMS["vsibench-multiimage"]
    questions = evaluation.read_vsi(exam, data / "test.jsonl", folder, evaluation.defaultdict(list))
    student = evaluation.load_student(str(run / "4_base"), torch.float32, "cpu", "world2vlm", 10**6)
    return student, list(questions)


def test_eighteen_questions_about_a_video_come_five_times_faster_than_one_by_one(eighteen):
    student, questions = eighteen
    answers(student, questions[:1], 2)  # cut the frames, wake the threads
    begun = time.process_time()
    alone = [answers(student, [question], 16)[0] for question in questions]
    middle = time.process_time()
    together = answers(student, questions, 16)
    end = time.process_time()
    faster = (middle - begun) / (end - middle)
    print(f"18 questions, 32 frames: {middle - begun:.2f} s one by one, {faster:.1f} times faster")
    assert together == alone and faster >= 5
    assert len({tuple(response) for response in alone}) > 1


def test_eighteen_questions_about_a_video_hold_its_keys_once(eighteen, monkeypatch):
    """Each adds the keys of its own tokens, prompt and response, and nothing else."""
    student, questions = eighteen
    held, layer = [], generation.LayerWithRoom

    def counted(*given):
        held.append(layer(*given))
        return held[-1]

    def columns(asked):
        held.clear()
        answers(student, asked, 16)
        assert {one.keys.shape[0] for one in held} == {1}
        return held[0].keys.shape[2]

    monkeypatch.setattr(generation, "LayerWithRoom", counted)
    monkeypatch.setattr(generation, "end_tokens", lambda student: [-1])
    prompts = evaluation.prompts_of(student, questions, False)
    ((_, head),) = generation.shared_heads(prompts, student.model.config)
    own = sum(len(prompt["ids"]) - head + 15 for prompt in prompts)
    assert columns(questions) == head + own
    assert columns(questions[:1]) == len(prompts[0]["ids"]) + 15


@pytest.mark.parametrize(
    "family, attention", [("qwen3", "world2vlm"), ("qwen3", "sdpa"), ("qwen2.5", "world2vlm")]
)
def test_shared_prefill_answers_as_alone(run, tmp_path, family, attention):
    """Groups of one, two and three questions about one and two pictures, in one batch; sampled
    too. One text is longer than the room of a layer."""
    if family == "qwen2.5":
        student = tiny_qwen(run, tmp_path, attention, "qwen2.5")
    else:
        source = str(run / "4_base")
        student = evaluation.load_student(source, torch.float32, "cpu", attention, 10**6)
    questions = []
    for scene, (pictures, count) in enumerate([(2, 3), (1, 2), (2, 1)]):
        paths = [tmp_path / f"{scene}_{k}.png" for k in range(pictures)]
        for k, path in enumerate(paths):
            path.write_bytes(picture(10 * scene + k, 40 + 30 * scene))
        for number in range(count):
            text = "<image>" * pictures + "Which way, " * 60 + "number " * 3 * number
            turns = [("user", f"{text}{number}?"), ("assistant", "yes")]
            messages = [{"role": role, "content": content} for role, content in turns]
            paths = [str(path) for path in paths]
            questions.append({"record": {"images": paths, "messages": messages}})
    prompts = evaluation.prompts_of(student, questions, False)
    heads = generation.shared_heads(prompts, student.model.config)
    assert [len(members) for members, _ in heads] == [3, 2, 1]
    uniforms = torch.rand(6, 4, generator=torch.Generator().manual_seed(3))
    together = evaluation.generate(student, prompts, 8)
    sampled = evaluation.generate(student, prompts, 4, 1.0, uniforms)
    for i, prompt in enumerate(prompts):
        assert evaluation.generate(student, [prompt], 8) == [together[i]]
        assert evaluation.generate(student, [prompt], 4, 1.0, uniforms[[i]]) == [sampled[i]]


def test_text_before_the_pictures_is_shared_only_where_it_is_the_same():
    token, pixels = 90, torch.zeros(1)

    def heads(*prompts):
        prompts = [{"ids": torch.tensor(ids), "pixels": pixels} for ids in prompts]
        config = SimpleNamespace(image_token_id=token, get_text_config=lambda: None)
        return generation.shared_heads(prompts, config)

    assert heads([91, token, 95, 96], [91, token, 95, 97]) == [([0, 1], 3)]
    assert heads([91, token, 95, 96], [92, token, 95, 96]) == [([0], 3), ([1], 3)]
    assert heads([91, token, 95], [91, token, 95]) == [([0, 1], 2)]  # the same question twice
