"""The public benchmarks in 06: scorers against golden data, loaders on data sets in their published layouts, bad rows, shared prefill, shards."""
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, tiny_qwen25
from PIL import Image

HERE = Path(__file__).parent / "golden"
exam = load("06")


def golden(name: str) -> list[dict]:
    path = HERE / f"open_g5_{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- scorers ---------------------------------------------------------------------------------------------------------------------------

def test_vsi_scores_equal_the_public_ones():
    for item in golden("vsibench_items"):
        assert exam.score_vsi(item["question_type"], item["prediction"], item["ground_truth"]) == pytest.approx(item["score_direct"], abs=1e-9)
        said = exam.without_thoughts(item["prediction"])
        assert exam.score_vsi(item["question_type"], said, item["ground_truth"]) == pytest.approx(item["score_cli"], abs=1e-9), item


def test_vsi_aggregate_of_a_whole_run():
    scored = [(item["question_type"], exam.score_vsi(item["question_type"], exam.without_thoughts(item["prediction"]), item["ground_truth"]))
              for item in golden("vsibench_run")]
    got, want = exam.aggregate_vsi(scored), golden("aggregates")[0]["subscores_unrounded"]
    assert len(got) == len(want) == 9
    for key, value in want.items():
        assert got[key.removesuffix("_accuracy").removesuffix("_MRA:.5:.95:.05")] == pytest.approx(value, abs=1e-9)


def test_mindcube_equals_the_public_evaluator():
    for item in golden("mindcube_items"):
        assert exam.extract_choice(item["answer"]) == item["extracted"], item
        assert exam.setting_of(item["id"]) == item["setting_official"]
    run, want = golden("mindcube_run"), golden("aggregates")[1]
    counted = [item for item in run if item["gt_answer"]]
    for setting, values in want["official"]["settings"].items():
        right = [exam.extract_choice(item["answer"]) == item["gt_answer"] for item in counted if exam.setting_of(item["id"]) == setting]
        assert (len(right), sum(right)) == (values["total"], values["gen_cogmap_correct"])
        assert np.mean(right) == pytest.approx(values["gen_cogmap_accuracy"], abs=1e-9)
    left_out = exam.PROTOCOLS["mindcube"]["mindcube"]["not_counted"]
    right = [exam.extract_choice(item["answer"]) == item["gt_answer"] for item in counted if exam.setting_of(item["id"]) not in left_out]
    assert np.mean(right) == pytest.approx(want["official"]["gen_cogmap_accuracy"], abs=1e-9)


def test_sat_equals_both_public_scorers():
    items, run, want = golden("sat_items"), golden("sat_run"), golden("aggregates")[2]
    for item in items + run:
        assert exam.score_sat(item["response"], item["answers"], item["correct_answer"]) == item["mj_score"], item
        said = exam.sat_letter(item["response"], item["question"])
        assert said == item["lmms_filtered"], item
        sample = {"task_type": item["question_type"], "options": item["answers"], "truth": item["lmms_target"], "question": item["question"]}
        assert exam.score_choice("sat letter", sample, item["response"])["score"] == item["lmms_score"], item
    scores = [exam.score_sat(item["response"], item["answers"], item["correct_answer"]) for item in run]
    assert np.mean(scores) == pytest.approx(want["mj_all"], abs=1e-9)
    for kind, value in want["mj_types"].items():
        assert np.mean([score for item, score in zip(run, scores) if item["question_type"] == kind]) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("scorer, kind, options, truth, response, score, corrected", [
    ("vsi", "object_rel_distance", ["chair", "sofa"], "A", "A\n\nbecause", 0, 1), ("vsi", "object_rel_distance", ["chair", "sofa"], "A", "(A)", 0, 1),
    ("vsi", "object_rel_distance", ["chair", "sofa"], "A", "A. chair", 1, 1), ("vsi", "object_rel_distance", ["chair", "sofa"], "A", "the sofa", 0, 0),
    ("vsi", "object_counting", [], "5", ".5", 1, 0), ("vsi", "object_abs_distance", [], "0.5", "about .5 m", 0, 1),
    ("vsi", "object_size_estimation", [], "1200", "1,200", 0, 1), ("vsi", "object_counting", [], "3", "Three chairs", 1, 1),
    ("sat text", "obj_movement", ["yes", "no"], "no", "I know: yes", 1, 0), ("sat text", "obj_movement", ["yes", "no"], "no", "no\n", 0, 1),
    ("sat text", "ego_movement", ["left", "right"], "left", "left or right", 1, 0),
    ("sat text", "ego_movement", ["rotated left", "not rotated left"], "rotated left", "not rotated left", 1, 0),
    ("sat letter", "ego_movement", ["left", "right"], "B", "B\nright", 0, 1), ("sat letter", "ego_movement", ["left", "right"], "B", "right", 0, 1),
    ("mindcube", "around", ["Above", "Under"], "B", "<answer>B. Under</answer>", 1, 1),
    ("mindcube", "around", ["Above", "Under"], "B", "<answer>B</answer> not A. Above", 0, 1)])
def test_what_a_public_scorer_gets_wrong_is_scored_right_beside_it(scorer, kind, options, truth, response, score, corrected):
    sample = {"task_type": kind, "options": options, "truth": truth, "question": "Where?"}
    got = exam.score_choice(scorer, sample, response)
    assert (got["score"], got["corrected"]) == (score, corrected)


def test_the_published_subset_of_sat():
    path = HERE / "sat_subsets.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    assert {int(row) for row in exam.SAT_SYNTHESIZED.split()} == set(json.loads(path.read_text())["val_rows"])


def test_intervals_of_vsi_take_the_mean_of_categories():
    scored = [(item["question_type"], item["score_cli"]) for item in golden("vsibench_run")]
    samples = [{"task_type": kind, "scene_id": f"scene {i % 60}"} for i, (kind, _) in enumerate(scored)]
    got = exam.overall_interval("vsi-bench", samples, np.array([score for _, score in scored]), 0)
    assert got["mean"] == pytest.approx(exam.aggregate_vsi(scored)["overall"], abs=1e-6) and got["low"] < got["mean"] < got["high"] < got["low"] + 0.15


# --- data sets in their published layouts ----------------------------------------------------------------------------------------------

def picture(number: int, side: int = 40) -> bytes:
    content = io.BytesIO()
    draw = np.random.default_rng(number)
    Image.fromarray(draw.integers(0, 256, (side, side + 12, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def write_video(path: Path, frames: int, side: int = 56):
    """Frame i is flat grey of brightness 2 i + 10, so that a test can tell which frames were taken."""
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = side, side, "yuv420p", 4_000_000
        for i in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.full((side, side, 3), 2 * i + 10, np.uint8), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_lines(path: Path, rows: list):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def sat_row(number: int, **changes) -> dict:
    row = {"image_bytes": [{"bytes": picture(number + k), "path": None} for k in range(1 + number % 2)], "question": f"Which way, {number}?",
           "answers": ["rotated left", "rotated right"], "correct_answer": ("rotated left", "rotated right")[number % 3 > 0],
           "question_type": ("ego_movement", "obj_movement")[number % 2]}
    return row | changes


def write_sat(folder: Path, rows: list[dict], name: str = "SAT_test.parquet") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("image_bytes", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))), ("question", pa.string()),
                        ("answers", pa.list_(pa.string())), ("question_type", pa.string()), ("correct_answer", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / name, row_group_size=4)
    return folder


def vsi_row(id: int, scene: str, kind: str, truth: str, options: list[str] | None = None, dataset: str = "scannet") -> dict:
    return {"id": id, "dataset": dataset, "scene_name": scene, "question_type": kind, "question": f"Question {id}?", "options": options,
            "ground_truth": truth}


def write_vsi(folder: Path, scenes: int = 2, a_video: int = 18, frames: int = 40) -> Path:
    rows = []
    for scene in range(scenes):
        write_video(folder / f"scannet/scene{scene}.mp4", frames + scene)
        for k in range(a_video):
            kind = list(exam.VSI_TYPES)[k % 10]
            choice = exam.VSI_TYPES[kind] == "choice"
            rows.append(vsi_row(len(rows), f"scene{scene}", kind, "AB"[k % 2] if choice else str(1 + k), ["A. lamp", "B. sofa"] if choice else None))
    write_lines(folder / "test.jsonl", rows)
    return folder


def write_mindcube(folder: Path, rows: int = 6) -> Path:
    records = []
    for number in range(rows):
        images = [f"other_all_image/among/scene{number // 2}/{k}.png" for k in range(2)]
        for image in images:
            (folder / "data" / image).parent.mkdir(parents=True, exist_ok=True)
            (folder / "data" / image).write_bytes(picture(number // 2 + len(image)))
        name = ("among_group", "around_group", "translation_group")[number % 3]
        records.append({"id": f"{name}{number:03d}_q1", "category": ["p"], "type": "x", "question": f"Where is the lamp, {number}? A. Above B. Under C. Left",
                        "images": images, "gt_answer": "ABC"[number % 3]})
    write_lines(folder / "data/raw/MindCube_tinybench.jsonl", records)
    return folder


def sit(run: Path, data: Path, name: str, says, monkeypatch, **settings) -> dict:
    """Sit an exam with `says(question, blank) -> response` in place of a student; its results."""
    (run / "student").mkdir(parents=True, exist_ok=True)

    def prepare(student, batch, blank):
        sights = {tuple(q["record"]["images"]): exam.sight(None, q, blank) for q in batch}
        return [sights[tuple(q["record"]["images"])] if isinstance(sights[tuple(q["record"]["images"])], str) else (q, blank) for q in batch]
    monkeypatch.setattr(exam, "student_of", lambda *args: None)
    monkeypatch.setattr(exam, "look", lambda student, paths, blank=False: [Image.open(path).load() for path in paths])
    monkeypatch.setattr(exam, "prepare", prepare)
    monkeypatch.setattr(exam, "answer", lambda student, prompts, most: [(says(*prompt), 3) for prompt in prompts])
    monkeypatch.setattr(exam, "spent", lambda student, prompt, generated, seconds: exam.NOTHING | {"tokens": generated})
    cfg = exam.Config(**({"run": str(run), "checkpoint": "student", "exam": name, "data": str(data), "tag": "x"} | settings))
    exam.main(cfg)
    path = run / "6_eval" / cfg.tag / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def right(question, blank):
    return "C." if blank else question["truth"]


def samples_of(run: Path, tag: str = "x") -> list[dict]:
    return [json.loads(line) for line in (run / "6_eval" / tag / "samples.jsonl").read_text().splitlines()]


def test_sat_real_end_to_end(tmp_path, monkeypatch, capsys):
    rows = [sat_row(i) for i in range(9)]
    rows[2]["image_bytes"][0]["bytes"] = b"no picture"
    rows[4] = sat_row(4, question_type="riddle")
    rows[5] = sat_row(5, correct_answer="neither")
    results = sit(tmp_path, write_sat(tmp_path / "sat", rows), "sat-real", right, monkeypatch)
    assert results["questions"] == 6 and results["skipped"] == 3
    assert results["skipped_by_reason"] == {"corrupt parquet row": 2, "unknown question type": 1}
    assert results["overall"]["score"]["mean"] == results["overall"]["corrected"]["mean"] == 1 and results["overall"]["score"]["blank"]["mean"] == 0
    assert results["overall"]["score"]["constant"]["mean"] == pytest.approx(4 / 6, abs=1e-6)  # "rotated right" is true of 1, 7, 8 and ...
    assert results["protocol"]["name"] == "paper" and results["protocol_sha256"] == exam.sha256(results["protocol"])
    table = capsys.readouterr().out
    assert "skipped, corrupt parquet row" in table and "skipped, unknown question type" in table
    samples = samples_of(tmp_path)
    assert {"number", "id", "exam", "task_type", "question", "images", "truth", "response", "scores"} <= set(samples[0])
    assert {"seconds", "prompt_tokens", "tokens"} <= set(samples[0]["cost"])
    assert all(Image.open(tmp_path / image).size == (512, 512) for sample in samples for image in sample["images"])  # MindJourney's middle square
    assert [len(sample["images"]) for sample in samples] == [1 + sample["number"] % 2 for sample in samples]


def test_sat_synthesized_takes_the_published_rows_and_letters_where_the_protocol_asks(tmp_path, monkeypatch):
    data = write_sat(tmp_path / "sat", [sat_row(i) for i in range(40)], "SAT_val.parquet")
    kept = sorted(int(row) for row in exam.SAT_SYNTHESIZED.split() if int(row) < 40)
    results = sit(tmp_path, data, "sat-synthesized", right, monkeypatch, protocol="lmms-eval", blank=False)
    assert [sample["number"] for sample in samples_of(tmp_path)] == kept and results["overall"]["score"]["mean"] == 1
    assert {sample["truth"] for sample in samples_of(tmp_path)} == {"A", "B"}
    assert results["skipped_by_reason"] == {"missing row": 500 - len(kept)}  # the file is shorter than the published one
    assert sit(tmp_path, data, "sat-synthesized", right, monkeypatch, subset="all", tag="all", blank=False)["questions"] == 40


def test_a_broken_parquet_file_costs_its_rows_only(tmp_path, monkeypatch):
    import pyarrow.parquet as pq
    data = write_sat(tmp_path / "sat", [sat_row(i) for i in range(12)])
    path = data / "SAT_test.parquet"
    second = pq.ParquetFile(path).metadata.row_group(1).column(1)  # of rows 4 to 7: the pictures' bytes
    content = bytearray(path.read_bytes())
    start = second.dictionary_page_offset or second.data_page_offset
    content[start:start + 40] = b"\xff" * 40
    path.write_bytes(content)
    results = sit(tmp_path, data, "sat-real", right, monkeypatch, blank=False)
    assert results["questions"] == 8 and results["skipped_by_reason"] == {"corrupt parquet row": 4}
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(SystemExit) as ended:
        sit(tmp_path, data, "sat-real", right, monkeypatch, tag="none")
    assert ended.value.code == 2


def test_vsi_bench_end_to_end(tmp_path, monkeypatch, capsys):
    data = write_vsi(tmp_path / "vsi", scenes=2, a_video=20)
    rows = (data / "test.jsonl").read_text().splitlines()
    rows += [json.dumps(row) for row in (vsi_row(90, "absent", "object_counting", "3"), vsi_row(91, "scene0", "riddle", "3"),
                                         vsi_row(92, "broken", "object_counting", "3"), vsi_row(93, "broken", "room_size_estimation", "3"),
                                         vsi_row(94, "scene0", "object_counting", "none"), vsi_row(95, "../../secret", "object_counting", "3"))]
    write_lines(data / "test.jsonl", rows + ['{"half'])
    whole = (data / "scannet/scene1.mp4").read_bytes()
    (data / "scannet/broken.mp4").write_bytes(whole[:300])
    results = sit(tmp_path, data, "vsi-bench", right, monkeypatch, protocol="lmms-eval", frames=8)
    assert results["questions"] == 40 and results["skipped"] == 7
    assert results["skipped_by_reason"] == {"corrupt row": 1, "malformed line": 1, "missing video": 2, "unknown question type": 1, "unreadable video": 2}
    assert results["overall"]["score"]["mean"] == 1 and results["tasks"]["object_counting"]["skipped"] == 4
    assert results["overall"]["score"]["constant"]["mean"] < 1 and results["protocol"]["frames"] == 8
    sample = samples_of(tmp_path)[0]
    levels = [np.asarray(Image.open(tmp_path / image).convert("L")).mean() for image in sample["images"]]
    assert np.allclose(levels, 2 * np.linspace(0, 39, 8).astype(int) + 10, atol=3)  # the frames of linspace(0, n - 1, 8)
    out = capsys.readouterr()
    assert "skipped, missing video" in out.out and "absent.mp4" in out.err


def test_rows_of_wrong_types_are_counted(tmp_path, monkeypatch):
    vsi, cube = write_vsi(tmp_path / "vsi", scenes=1, a_video=4), write_mindcube(tmp_path / "cube")
    row = vsi_row(90, "scene0", "object_counting", "3")
    write_lines(vsi / "test.jsonl", (vsi / "test.jsonl").read_text().splitlines() + [row | {"options": 5}, row | {"scene_name": "a\0b"}, row | {"scene_name": "x" * 5000}])
    results = sit(tmp_path / "a", vsi, "vsi-bench", right, monkeypatch, frames=2, blank=False)
    assert results["questions"] == 4 and results["skipped_by_reason"] == {"corrupt row": 3}
    path = cube / "data/raw/MindCube_tinybench.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    write_lines(path, path.read_text().splitlines() + [first | {"images": ["a\0b"]}, first | {"images": ["x" * 5000]}])
    assert sit(tmp_path / "b", cube, "mindcube", right, monkeypatch, blank=False)["skipped_by_reason"] == {"corrupt row": 2}
    rows = write_sat(tmp_path / "sat", [sat_row(0), sat_row(1, question=None)])
    assert sit(tmp_path / "c", rows, "sat-real", right, monkeypatch, blank=False)["skipped_by_reason"] == {"corrupt parquet row": 1}


def test_the_choice_of_questions_does_not_depend_on_where_the_data_lie(tmp_path, monkeypatch):
    chosen = []
    for place in ("here", "there"):
        sit(tmp_path / place, write_mindcube(tmp_path / place / "cube", rows=30), "mindcube", right, monkeypatch, blank=False, per_task=3)
        chosen.append([sample["number"] for sample in samples_of(tmp_path / place)])
    assert chosen[0] == chosen[1] and len(chosen[0]) == 9


def test_a_picture_that_comes_back_is_asked_about(tmp_path, monkeypatch):
    """An exam whose pictures all went away ends in a line; with them back the same command answers every question."""
    data = write_mindcube(tmp_path / "cube", rows=6)
    monkeypatch.setattr(exam, "sight", lambda student, question, blank: "unreadable picture: gone")
    with pytest.raises(SystemExit) as ended:
        sit(tmp_path, data, "mindcube", right, monkeypatch, blank=False)
    assert ended.value.code == 2
    monkeypatch.undo()
    results = sit(tmp_path, data, "mindcube", right, monkeypatch, blank=False)
    assert results["questions"] == 6 and results["skipped"] == 0


def test_shards_of_different_batches_cover_the_exam(tmp_path, monkeypatch):
    data = write_mindcube(tmp_path / "cube", rows=30)
    sit(tmp_path, data, "mindcube", right, monkeypatch, blank=False, shard="0/2", batch=4)
    assert sit(tmp_path, data, "mindcube", right, monkeypatch, blank=False, shard="1/2", batch=3)["questions"] == 30


def test_vsi_debiased_subset(tmp_path, monkeypatch):
    data = write_vsi(tmp_path / "vsi", scenes=1, a_video=10)
    with pytest.raises(SystemExit) as ended:
        sit(tmp_path, data, "vsi-bench", right, monkeypatch, subset="debiased", frames=2)
    assert ended.value.code == 2
    (data / "pruned_ids.txt").write_text("1\n5\n")
    assert sit(tmp_path, data, "vsi-bench", right, monkeypatch, subset="debiased", frames=2, blank=False)["questions"] == 8


def test_mindcube_end_to_end(tmp_path, monkeypatch):
    data = write_mindcube(tmp_path / "cube")
    path = data / "data/raw/MindCube_tinybench.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    write_lines(path, path.read_text().splitlines() + [first | {"id": "among_q9", "gt_answer": None}, first | {"id": "other_q9", "images": ["no.png"]}])

    def says(question, blank):
        return f"<answer>{question['truth']}. x</answer>" if question["task"] != "translation" else "no idea"
    results = sit(tmp_path, data, "mindcube", says, monkeypatch, protocol="mindcube")
    assert results["questions"] == 6 and results["overall"]["score"]["mean"] == 1  # translation is not counted there
    assert results["tasks"]["translation"]["metrics"]["score"]["mean"] == 0 and results["tasks"]["translation"]["unparsable"] == 2
    assert results["skipped_by_reason"] == {"missing picture": 1, "no true answer": 1}
    assert sit(tmp_path, data, "mindcube", says, monkeypatch, protocol="lmms-eval", tag="lmms")["overall"]["score"]["mean"] == pytest.approx(4 / 6, abs=1e-6)
    exam.main(exam.Config(run=str(tmp_path), compare=["x", "lmms"]))
    compared = json.loads((tmp_path / "6_eval/compare.json").read_text())
    assert compared["tasks"]["all"]["score"]["n"] == 6 and compared["tasks"]["among"]["corrected"]["mean"] == 0


def test_words_of_the_protocols(tmp_path):
    """The published words, as they reach the student."""
    read = {}
    for name, folder in (("sat-real", write_sat(tmp_path / "sat", [sat_row(1)])), ("vsi-bench", write_vsi(tmp_path / "vsi", 1, 10, 3)),
                         ("mindcube", write_mindcube(tmp_path / "cube", 1))):
        for protocol in (p for p in exam.PROTOCOLS if name in exam.PROTOCOLS[p]):
            settings = exam.PROTOCOLS[protocol][name] | ({"frames": 2} if name == "vsi-bench" else {})
            questions = exam.READERS[name](name, folder, "", settings, tmp_path, exam.Skipped(name))
            read[protocol, name] = [question["record"]["messages"][-2]["content"] for question in questions]
    choice, number = read["lmms-eval", "vsi-bench"][3], read["lmms-eval", "vsi-bench"][6]
    assert choice == ("<image><image>These are frames of a video.\nQuestion 3?\nOptions:\nA. lamp\nB. sofa\n"
                      "Answer with the option's letter from the given choices directly.")
    assert number == "<image><image>These are frames of a video.\nQuestion 6?\nPlease answer the question using a single word or phrase."
    assert read["mindjourney", "sat-real"] == read["paper", "sat-real"] == [
        "These are the images that pair with the question.\n\nImage 1:\n<image>\nImage 2:\n<image>\n\nImage 1 is your current egocentric view\n\n"
        "Question: Which way, 1?\n\nAnswer Choices:\nrotated left\nrotated right\n\nOutput the exact answer from the choices.\nAnswer: \n"]
    assert read["lmms-eval", "sat-real"][0].endswith("A. rotated left\nB. rotated right\n\nOnly output the letter of the correct option and nothing else.")
    assert read["mindcube", "mindcube"][0].startswith("<image><image>[Task]\n") and read["mindcube", "mindcube"][0].endswith("[Question]\nWhere is the lamp, 0? A. Above B. Under C. Left")


@pytest.mark.parametrize("settings", [{"exam": "vsi"}, {"exam": "vsi-bench"}, {"exam": "mindcube", "data": "no/such/folder"},
                                      {"exam": "mindcube", "data": ".", "protocol": "mindjourney"}, {"exam": "mindcube", "data": "."},
                                      {"exam": "sat-real", "data": "."}, {"exam": "vsi-bench", "data": "."}, {"protocol": "lmms-eval"},
                                      {"exam": "sat-real", "data": ".", "subset": "debiased"}, {"exam": "sat-real", "data": ".", "tasks": ["A1"]},
                                      {"shard": "2/2"}, {"shard": "1"}, {"frames": -1}])
def test_wrong_settings_are_one_line(tmp_path, settings, capsys):
    (tmp_path / "student").mkdir()
    settings = settings | ({"data": str(tmp_path)} if settings.get("data") == "." else {})
    with pytest.raises(SystemExit) as ended:
        exam.main(exam.Config(run=str(tmp_path), checkpoint="student", **settings))
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_hub_id_is_fetched_and_unzipped_in_the_run(tmp_path, monkeypatch):
    source = write_vsi(tmp_path / "source", 1, 10, 3)
    shutil.make_archive(tmp_path / "scannet", "zip", source, "scannet")

    def fetch(name, repo_type, local_dir, allow_patterns):
        assert (name, repo_type) == ("nyu-visionx/VSI-Bench", "dataset")
        local_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "test.jsonl", local_dir)
        shutil.copy(tmp_path / "scannet.zip", local_dir)
    monkeypatch.setattr(exam, "snapshot_download", fetch)
    assert sit(tmp_path, "nyu-visionx/VSI-Bench", "vsi-bench", right, monkeypatch, frames=2, blank=False)["skipped"] == 0


# --- resume and shards -----------------------------------------------------------------------------------------------------------------

def without_times(run: Path, tag: str) -> tuple:
    results = json.loads((run / "6_eval" / tag / "results.json").read_text())
    return [sample | {"cost": 0} for sample in samples_of(run, tag)], {key: value for key, value in results.items() if key not in ("tag", "cost")}


def test_two_shards_equal_one_run_and_a_killed_exam_goes_on(tmp_path, monkeypatch, capsys):
    data = write_vsi(tmp_path / "vsi", scenes=4, a_video=10)
    settings = {"frames": 2, "batch": 10}

    def says(question, blank):
        return question["truth"] if question["number"] % 3 else "B"
    sit(tmp_path, data, "vsi-bench", says, monkeypatch, tag="whole", **settings)
    for shard in ("1/2", "0/2"):
        done = sit(tmp_path, data, "vsi-bench", says, monkeypatch, tag="shards", shard=shard, **settings)
        assert bool(done) == (shard == "0/2") and ("20 answers of other shards are missing" in capsys.readouterr().out) == (shard == "1/2")
    assert without_times(tmp_path, "shards") == without_times(tmp_path, "whole")
    assert not list((tmp_path / "6_eval/shards").glob("*of*"))

    def killed(question, blank):
        if question["number"] >= 20:
            raise KeyboardInterrupt
        return says(question, blank)
    with pytest.raises(KeyboardInterrupt):
        sit(tmp_path, data, "vsi-bench", killed, monkeypatch, tag="killed", **settings)
    log = tmp_path / "6_eval/killed/samples.jsonl"
    assert [json.loads(line)["number"] for line in log.read_text().splitlines()] == list(range(20))
    log.write_bytes(log.read_bytes()[:-30])  # the last line is half there
    asked = []
    sit(tmp_path, data, "vsi-bench", lambda q, blank: asked.append(q["number"]) or says(q, blank), monkeypatch, tag="killed", **settings)
    assert sorted(set(asked)) == list(range(19, 40))
    assert without_times(tmp_path, "killed") == without_times(tmp_path, "whole")


def test_a_tiny_student_killed_resumed_one_by_one_and_in_shards(run, tmp_path):
    """The real model: 2 x 7 questions in one run, in two shards one by one, and killed in the middle: the same answers and results."""
    data, folder = write_vsi(tmp_path / "vsi", scenes=2, a_video=7, frames=6), tmp_path / "run"
    (folder / "student").parent.mkdir()
    (folder / "student").symlink_to(run / "4_base")
    common = {"run": str(folder), "checkpoint": "student", "exam": "vsi-bench", "data": str(data), "frames": 2, "max_new_tokens": 4, "device": "cpu"}
    exam.main(exam.Config(**common, tag="whole"))
    for shard in ("0/2", "1/2"):
        exam.main(exam.Config(**common, tag="shards", shard=shard, batch=1))
    assert without_times(folder, "shards") == without_times(folder, "whole")
    flags = [part for key, value in common.items() for part in (f"--{key}", str(value))]
    command, log = [sys.executable, exam.__file__, *flags, "--tag", "killed", "--batch", "1"], folder / "6_eval/killed/samples.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.005)
        process.kill()
    assert not (log.parent / "results.json").is_file() and 1 <= len(log.read_text().splitlines()) < 14
    exam.main(exam.Config(**common, tag="killed"))
    assert without_times(folder, "killed") == without_times(folder, "whole")


# --- one prefill for the questions about the same pictures ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def eighteen(run, tmp_path_factory):
    """The tiny student of `run` and a video with 18 questions, as prompts of 32 frames."""
    folder = tmp_path_factory.mktemp("video")
    data = write_vsi(folder / "vsi", scenes=1, a_video=18, frames=64)
    protocol = exam.PROTOCOLS["paper"]["vsi-bench"]
    questions = exam.read_vsi("vsi-bench", data, "", protocol, folder, exam.Skipped("vsi"))
    return exam.load_student(str(run / "4_base"), torch.float32, "cpu", "world2vlm", 10**6), questions


def test_eighteen_questions_about_a_video_come_five_times_faster_than_one_by_one(eighteen):
    student, questions = eighteen
    exam.answer(student, exam.prepare(student, questions[:1], False), 2)  # cut the frames, wake the threads
    begun = time.process_time()
    alone = [exam.answer(student, exam.prepare(student, [question], False), 16)[0] for question in questions]
    middle = time.process_time()
    together = exam.answer(student, exam.prepare(student, questions, False), 16)
    end = time.process_time()
    print(f"18 questions, 32 frames: one by one {middle - begun:.2f} s, together {end - middle:.2f} s, {(middle - begun) / (end - middle):.1f} times")
    assert together == alone
    assert (middle - begun) / (end - middle) >= 5
    assert len({response for response, _ in alone}) > 1


@pytest.mark.parametrize("family, attention", [("qwen3", "world2vlm"), ("qwen3", "sdpa"), ("qwen25", "world2vlm")])
def test_shared_prefill_answers_as_alone(run, tmp_path, family, attention):
    """Groups of one, two and three questions about one and two pictures, in one batch; sampled too."""
    student = tiny_qwen25(run, tmp_path, attention) if family == "qwen25" else \
        exam.load_student(str(run / "4_base"), torch.float32, "cpu", attention, 10**6)
    questions = []
    for scene, (pictures, count) in enumerate([(2, 3), (1, 2), (2, 1)]):
        paths = [tmp_path / f"{scene}_{k}.png" for k in range(pictures)]
        for k, path in enumerate(paths):
            path.write_bytes(picture(10 * scene + k, 40 + 30 * scene))
        for number in range(count):
            user = "<image>" * pictures + "Which way did the camera turn, question " + "number " * number + f"{number}?"
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "yes"}]
            questions.append({"record": {"images": [str(path) for path in paths], "messages": messages}})
    prompts = exam.prepare(student, questions, False)
    heads = exam.shared_heads(prompts, student.model.config.image_token_id)
    assert [len(members) for members, _ in heads] == [3, 2, 1]
    together = exam.generate(student, prompts, 8)
    assert together == [exam.generate(student, [prompt], 8)[0] for prompt in prompts]
    uniforms = torch.rand(12, 4, generator=torch.Generator().manual_seed(3))
    sampled = exam.generate(student, prompts, 4, samples=2, uniforms=uniforms)
    assert sampled == [exam.generate(student, [prompt], 4, samples=2, uniforms=uniforms[2 * i:2 * i + 2])[0] for i, prompt in enumerate(prompts)]


def test_text_before_the_pictures_is_shared_only_where_it_is_the_same(eighteen):
    student, questions = eighteen
    token = student.model.config.image_token_id
    pixels = torch.zeros(1)

    def prompt(*ids): return {"ids": torch.tensor(ids), "pixels": pixels}
    assert exam.shared_heads([prompt(91, token, 95, 96), prompt(91, token, 95, 97)], token) == [([0, 1], 3)]
    assert exam.shared_heads([prompt(91, token, 95, 96), prompt(92, token, 95, 96)], token) == [([0], 4), ([1], 4)]
    assert exam.shared_heads([prompt(91, token, 95), prompt(91, token, 95)], token) == [([0, 1], 2)]  # the same question twice


def test_a_cache_with_room_holds_what_a_growing_one_holds():
    from transformers.cache_utils import DynamicLayer
    draw = torch.Generator().manual_seed(0)
    grown, rows = DynamicLayer(), torch.tensor([1, 0, 1])
    grown.update(torch.randn(2, 2, 5, 4, generator=draw), torch.randn(2, 2, 5, 4, generator=draw))
    roomy = exam.Roomy(grown, rows, 2)
    grown.batch_select_indices(rows)
    for _ in range(7):  # past the room, twice
        step = torch.randn(2, 3, 2, 1, 4, generator=draw)
        assert all(torch.equal(a, b) for a, b in zip(roomy.update(*step), grown.update(*step)))
        assert roomy.get_seq_length() == grown.get_seq_length()
