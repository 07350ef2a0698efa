"""The probes of tests/shortcuts.py find a planted shortcut, and nothing where there is none."""

import json
from pathlib import Path

import numpy as np
import pytest
import shortcuts
from conftest import script
from PIL import Image, ImageDraw, ImageFilter


def planted(run: Path, shortcut: str, scenes: int = 60, each: int = 4):
    """Questions of task A4 whose answer is random, but for what `shortcut` gives away."""
    draw = np.random.default_rng(0)
    files, views = {"sft": [], "heldout": []}, []
    for scene in range(scenes):
        for k in range(each):
            truth = bool(draw.integers(2))
            colors, paths = draw.integers(0, 256, (2, 3)), []
            yaw_deg, right = int(draw.integers(360)), bool(draw.integers(2))
            turn_deg = 50 if (truth if shortcut == "headings" else right) else -50
            if shortcut == "hues in boxes":
                colors = [[200, 30, 30], [200, 30, 30] if truth else [30, 30, 200]]
            for number, color in enumerate(colors):
                noise = draw.integers(0, 60, (40, 40, 3)) + np.array(color) * 0.75
                if shortcut == "headings":  # the room has a compass: bright in the north
                    angle = np.radians(9 * np.arange(40) + yaw_deg + number * turn_deg)
                    noise = noise / 4 + 100 + 80 * np.cos(angle)[None, :, None]
                picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
                told = {"picture 1": 0, "picture 2": 1}.get(shortcut)
                if told == number:
                    side = 0 if truth else 20
                    ImageDraw.Draw(picture).rectangle([side, 0, side + 19, 39], fill="white")
                if shortcut == "holes" and number == 1:
                    side = 0 if truth else 32
                    ImageDraw.Draw(picture).rectangle([side, 0, side + 7, 39], fill=(127,) * 3)
                if shortcut == "sharpness" and number == 1:
                    side = 0 if truth else 20
                    half = picture.crop((side, 0, side + 20, 40))
                    picture.paste(half.filter(ImageFilter.BoxBlur(1)), (side, 0))
                paths.append(f"{scene}_{k}_{number}.png")
                picture.save(run / paths[-1])
            c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
            c2w = [np.eye(4).tolist(), [[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]]]
            view = {"scene_id": f"room_{scene:05d}", "start": [0, 0, yaw_deg], "kept": [0, 1]}
            views.append(json.dumps(view | {"frames": paths, "c2w": c2w}))
            value = int(draw.integers(1, 9)) * 10
            if shortcut == "words":
                value = 20 if truth else 30
            words = "<image><image>The ball is at [100, 100, 900, 900] in image 1 and at "
            words += f"[100, 100, 900, 900] in image 2. Did it turn left {value} degrees?"
            said = {"role": "user", "content": words}
            answer = {"role": "assistant", "content": str(truth).lower()}
            record = {"task_type": "A4", "answer_type": "yes_no", "messages": [said, answer]}
            record |= {"images": paths, "scene_id": f"room_{scene:05d}"}
            files["heldout" if scene % 4 == 0 else "sft"].append(json.dumps(record))
    (run / "3_qa").mkdir()
    (run / "2_views").mkdir()
    (run / "2_views/views.jsonl").write_text("\n".join(views) + "\n")
    for name, lines in files.items():
        (run / f"3_qa/{name}.jsonl").write_text("\n".join(lines) + "\n")


FINDS = ["words", "picture 1", "picture 2", "headings", "hues in boxes", "holes", "sharpness"]


@pytest.mark.parametrize("shortcut", [*FINDS, "none"])
def test_probes_find_what_is_planted_and_nothing_else(tmp_path, shortcut):
    planted(tmp_path, shortcut)
    found = shortcuts.probe_run(tmp_path)["A4"]
    assert found["n"] == 60
    if shortcut in FINDS:
        score, half = found[shortcut]
        assert score - half > 0.8, found
        if shortcut == "picture 1":
            assert found["words"][0] < 0.7, found
    over = shortcuts.violations({"A4": found}, cross=False)
    assert any(f"by {shortcut}" in line for line in over) == (shortcut in FINDS), over


@pytest.mark.parametrize("form", ["A4", "A2 choice"])
def test_what_only_picture_and_statement_together_tell_is_found(tmp_path, form):
    """A bar tells the way of the turn, but neither whether a statement is true nor a letter."""
    planted(tmp_path, "holes")
    draw = np.random.default_rng(1)
    for path in (tmp_path / "3_qa").iterdir():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            ways = draw.permutation(["left", "right"]).tolist()
            way = "left" if record["messages"][1]["content"] == "true" else "right"
            turns = [f"turn {one} 20 degrees" for one in ways]
            words, answer = f"Was it this: {turns[0]}?", str(ways[0] == way).lower()
            if form == "A2 choice":
                record |= {"task_type": "A2", "answer_type": "choice", "options": turns}
                words, answer = f"Which turn? A. {turns[0]} B. {turns[1]}.", "AB"[ways.index(way)]
            for message, content in zip(record["messages"], (words, answer), strict=True):
                message["content"] = content
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = shortcuts.probe_run(tmp_path)[form]
    assert found["holes"][0] - found["holes"][1] > 0.8, found
    assert found["words"][0] < 0.7 and found["picture 1"][0] < 0.7, found


def test_a_run_without_questions_is_one_line(tmp_path):
    done = script("tests/shortcuts", tmp_path, check=False)
    assert done.returncode == 1 and "want a run folder" in done.stderr
    assert "Traceback" not in done.stderr
