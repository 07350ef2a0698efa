"""Two hundred bad lines: trajectories through 02, views through 03, questions through 04, 05, 06.

Each is made from a good line and appended to a good file, so the number of its line is known: it
must stand on stderr, unless the line is still sound, and no good line may be lost. A good file in
other dress (BOM, CRLF, no last newline, ...) must change nothing.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import ASK, OUT, TRAIN, Outcome, Row, before, records, run

WRONG = [None, True, -1, 0, 3.5, 1e308, 10**30, float("nan"), float("inf"), "", "text", "\ud800"]
WRONG += ["a\0b", "../../x", "/etc/passwd", [], [[]], {}, [None], {"a": 1}]
JUNK = [b"{", b"}", b"null", b"[]", b"42", b'"text"', b"nonsense", b"\xff\xfe\xfd", b"{}"]
JUNK += [b"{'single': 1}", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 100, b'{"a": 1e999999}']
JUNK += [b"9" * 5000, b"NaN", b"//", b'{"scene_id": "a"} {"scene_id": "b"}']
JUNK += ["{\u201cbad\u201d: 1}".encode(), '{"a": 1}'.encode("utf-16")]


def places(node, path=()) -> list[tuple]:
    """(holder, key, path) of every value within a record."""
    found = []
    if isinstance(node, (dict, list)):
        for key in node if isinstance(node, dict) else range(len(node)):
            found.append((node, key, (*path, key)))
            found += places(node[key], (*path, key))
    return found


def mutations(record: dict, count: int, seed: int) -> list[tuple[str, bytes]]:
    """Bad lines from a good one: junk, half lines, a key gone, a wrong value at some depth."""
    draw, line = np.random.default_rng(seed), json.dumps(record).encode()
    made = [("junk", junk) for junk in JUNK]
    made += [("half a line", line[:cut]) for cut in draw.integers(1, len(line) - 1, 12)]
    for gone in record:
        rest = {key: value for key, value in record.items() if key != gone}
        made.append((f"{gone} gone", json.dumps(rest).encode()))
    while len(made) < count:
        changed = copy.deepcopy(record)
        found = places(changed)
        depth = draw.integers(1, max(len(path) for _, _, path in found) + 1)
        found = [place for place in found if len(place[2]) == depth]
        node, key, path = found[draw.integers(len(found))]
        node[key] = WRONG[draw.integers(len(WRONG))]
        name = f"{'.'.join(map(str, path))} = {node[key]!r}"
        made.append((name, json.dumps(changed).encode()))
    return made[:count]


def other_dress(lines: list[bytes]) -> bytes:
    """The same records with a BOM, CRLF, blank lines, spaces, an unknown key, a line of 100 MB."""
    strange = [json.dumps(json.loads(line) | {"mood": [1, {"x": None}]}).encode() for line in lines]
    strange.insert(1, b'{"pad": "' + b"x" * 100_000_000 + b'"}')
    return b"\xef\xbb\xbf" + b"   \r\n\r\n".join(strange)  # and without a last newline


@dataclass
class Result:
    done: Outcome
    kept: set  # names of what came through, where the stage tells them
    used: int  # how many records came through
    counted: int = 0  # and how many with those that were skipped, each counted by the stage


def attack(row: Row, lines: list[bytes], bad: list[tuple], file: str, through, sound=None):
    """One case per bad line: named by its number, or sound; then the good file in other dress.

    through(name, data) -> Result; sound(result, line): is an unnamed line in the output? Without
    it the numbers must add up.
    """
    calm = through("good", b"\n".join(lines) + b"\n")
    row.case(
        "all good", calm.done.success() + ["skipped"] * ("skipped" in calm.done.err), calm.done
    )
    result = through("bad", b"\n".join([*lines, *(line for _, line in bad)]) + b"\n")
    failed, all_counted = result.done.success(), result.counted - calm.counted == len(bad)
    row.complaints += failed
    for number, (name, line) in enumerate(bad, len(lines) + 1):
        fine = f"{file}:{number}: skipped" in result.done.err
        fine = fine or (sound(result, line) if sound else all_counted)
        unseen = [f"line {number} is neither named nor in the output: {line[:150]!r}"]
        row.case(name, ["the stage failed"] if failed else unseen * (not fine))
    row.case("the good lines", [], result.done, lost=len(calm.kept - result.kept))
    again = through("dress", other_dress(lines))
    lost = max(len(calm.kept - again.kept), calm.used - again.used)
    row.case("in other dress", again.done.success(), again.done, lost=lost)


def name_of(record: dict) -> tuple:
    return record["scene_id"], record["traj_id"]


def bad_lines(record: dict, count: int, seed: int) -> list[tuple[str, bytes]]:
    """Mutations with a traj_id of their own, and a duplicate of the good record."""
    bad = mutations(record | {"traj_id": "BAD"}, count, seed)
    bad = [(name, line.replace(b'"BAD"', b'"b%03d"' % k)) for k, (name, line) in enumerate(bad)]
    return [*bad, ("a duplicate", json.dumps(record).encode())]


def trajectories(stage: str, whole: Path, place: Path, count: int) -> Row:
    """Through 02."""
    row, file = Row("02 over bad trajectories.jsonl"), "1_trajectories/trajectories.jsonl"
    lines = (whole / file).read_bytes().splitlines()[:4]

    def through(name, data):
        folder = before("02", whole, place / name)
        (folder / file).unlink()  # it is a link to the good one
        (folder / file).write_bytes(data)
        done = run("02", folder, "--keep ends --workers 1")
        kept = {name_of(view) for view in records(folder / "2_views/views.jsonl")}
        return Result(done, kept, len(kept))

    def sound(result, line):  # it made a view, or was skipped by its name
        try:
            scene, traj = name_of(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        skipped = f"{scene}/{traj}: skipped" in result.done.err or "left out" in result.done.out
        return (scene, traj) in result.kept or skipped

    bad = bad_lines(json.loads(lines[0]), count, 2)
    attack(row, lines, bad, "trajectories.jsonl", through, sound)
    return row


def views(stage: str, whole: Path, place: Path, count: int) -> Row:
    """Through 03."""
    row, file = Row("03 over bad views.jsonl"), "2_views/views.jsonl"
    lines = (whole / file).read_bytes().splitlines()

    def through(name, data):
        folder = before("03", whole, place / name)
        (folder / file).unlink()
        (folder / file).write_bytes(data)
        done, kept = run("03", folder), set()
        for part in ("static", "sft", "heldout"):
            kept |= {name_of(question) for question in records(folder / f"3_qa/{part}.jsonl")}
        if done.status:
            return Result(done, kept, 0)
        seen = json.loads((folder / "3_qa/card.json").read_text())["views"]
        named = {line for line in done.err.splitlines() if "views.jsonl:" in line}
        failed = seen["skipped"].get("failed the quality check", 0)  # which nobody names
        return Result(done, kept, seen["used"], seen["used"] + failed + len(named))

    attack(row, lines, bad_lines(json.loads(lines[0]), count, 3), "views.jsonl", through)
    return row


def bad_questions(record: dict) -> list[tuple[str, bytes]]:
    """What only a question can have wrong."""
    question, answer = record["messages"]
    marks, pictures = "<image><image>", record["images"]

    def asks(text: str) -> dict:
        return {"messages": [{"role": "user", "content": marks + text}, answer]}

    def says(text: str) -> dict:
        return {"messages": [question, {"role": "assistant", "content": text}]}

    changes = {
        "one picture too few": {"images": pictures[:1]},
        "one too many": {"images": pictures + pictures[:1]},
        "out of the root": {"images": ["../../../etc/hostname"] * 2},
        "absolute": {"images": ["/etc/hostname"] * 2},
        "missing picture": {"images": ["2_views/none.png"] * 2},
        "a folder": {"images": ["2_views", "2_views"]},
        "no answer": {"messages": [question]},
        "no role": {"messages": [{"content": question["content"]}, answer]},
        "picture tokens": asks("<|image_pad|>?"),
        "vision tokens": asks("<|vision_start|>?"),
        "endless text": asks("word " * 20_000),
        "surrogate": asks("\ud800?"),
        "surrogate answer": says("\udfff"),
        "answer outside the grammar": says("perhaps"),
        "unknown task": {"task_type": "Z9"},
        "empty answer": says(""),
    }
    return [(name, json.dumps(record | change).encode()) for name, change in changes.items()]


def questions(stage: str, whole: Path, place: Path, count: int) -> Row:
    """Through 04, 05 or 06."""
    row = Row(f"{stage} over bad questions")
    lines = (whole / "3_qa/heldout.jsonl").read_bytes().splitlines()[:6]
    record = next(r for r in map(json.loads, lines) if len(r["images"]) == 2)
    bad = bad_questions(record)
    bad += mutations(record, count - len(bad), int(stage))
    flags = {
        "04": TRAIN + f"--data all.jsonl --steps 1 --batch {count + 7} --val_share 0",
        "05": TRAIN
        + f"--data all.jsonl --steps 1 --prompts {count + 6} --group 2 --max_new_tokens 2",
        "06": ASK + "--questions all.jsonl --pictures shown",
    }

    def through(name, data):
        folder = before(stage, whole, place / name)
        (folder / "all.jsonl").write_bytes(data)
        done = run(stage, folder, flags[stage])
        used = question_count(stage, folder, done)
        skipped = {line for line in done.err.splitlines() if "skipped" in line}
        skipped = [line for line in skipped if "lines skipped" not in line]
        return Result(done, set(), used, used + len(skipped))

    attack(row, lines, bad, "all.jsonl", through)
    return row


def question_count(stage: str, folder: Path, done: Outcome) -> int:
    """How many questions were asked or trained on."""
    if done.status:
        return 0
    if stage == "06":
        return len(records(folder / OUT["06"] / "samples.jsonl"))
    later = {
        line for line in done.err.splitlines() if ": skipped," in line and ".jsonl:" not in line
    }
    counts = json.loads((folder / OUT[stage] / "meta.json").read_text())["counts"]
    return counts["questions"] - len(later)  # less those read that could not be put into tokens
