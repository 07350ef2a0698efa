"""Two hundred mutations of good files: trajectories through 02, views through 03, questions through 04, 05 and 06.

Each mutated line is appended to a good file; so the number of its line is known, must stand on stderr, and no good line may be
lost. Mutations of the whole file (BOM, CRLF, no last newline, ...) must change nothing. A mutation that leaves a sound record is HARMLESS.
"""
import copy
import json
from pathlib import Path

import numpy as np
from harness import TINY, Row, before, run

WRONG = [None, True, -1, 0, 3.5, 1e308, 10**30, float("nan"), float("inf"), "", "text", "\ud800", "a\0b", "../../x", "/etc/passwd", [], [[]], {}, [None], {"a": 1}]
JUNK = [b"{", b"}", b"null", b"[]", b"42", b'"text"', b"nonsense", b"\xff\xfe\xfd", b"{}", b"{'single': 1}", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 100,
        b'{"a": 1e999999}', b"9" * 5000, b"NaN", b"//", b'{"scene_id": "a"} {"scene_id": "b"}', "{\u201cbad\u201d: 1}".encode(), '{"a": 1}'.encode("utf-16")]


def mutations(record: dict, count: int, seed: int) -> list[tuple[str, bytes]]:
    """`count` bad lines made from a good one: half lines, junk, a key gone, a value of the wrong kind at some depth."""
    draw, line, made = np.random.default_rng(seed), json.dumps(record).encode(), [("junk", junk) for junk in JUNK]
    made += [("half a line", line[:cut]) for cut in draw.integers(1, len(line) - 1, 12)]
    made += [(f"{key} gone", json.dumps({k: v for k, v in record.items() if k != key}).encode()) for key in record]
    while len(made) < count:
        changed, places = copy.deepcopy(record), []

        def walk(node, path):
            for key in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
                places.append((node, key, [*path, key]))
                walk(node[key], [*path, key])
        walk(changed, [])
        depth = draw.integers(1, max(len(path) for _, _, path in places) + 1)
        at = [place for place in places if len(place[2]) == depth]
        node, key, path = at[draw.integers(len(at))]
        node[key] = WRONG[draw.integers(len(WRONG))]
        made.append((f"{'.'.join(map(str, path))} = {node[key]!r}", json.dumps(changed).encode()))
    return made[:count]


def whole_files(data: bytes, unknown: bytes) -> dict[str, bytes]:
    """Good files in other dress."""
    return {"BOM": b"\xef\xbb\xbf" + data, "CRLF": data.replace(b"\n", b"\r\n"), "no last newline": data.rstrip(b"\n"), "blank lines": data.replace(b"\n", b"\n\n"),
            "unknown keys": unknown, "spaces": data.replace(b"\n", b"   \n"), "100 MB line": data + b'{"pad": "' + b"x" * 100_000_000 + b'"}\n'}


def tell(row: Row, outcome, bad: list[tuple[str, bytes]], first: int, kept: set, good: set, sound, named):
    """One case a bad line: named by its number, or else sound, and in the output then."""
    if outcome.status:
        row.complaints.append(f"{row.attack}: status {outcome.status}: {outcome.err[-1500:]}")
    for number, (name, line) in enumerate(bad, first):
        fine = not outcome.status and (named(number, line) or sound(number, line))
        faults = [] if fine else ["the stage failed" if outcome.status else f"line {number} is neither named nor in the output: {line[:150]!r}"]
        row.case(name, faults)
    row.case("the good lines", [f"missing: {sorted(good - kept)[:3]}"] * bool(good - kept), outcome, lost=len(good - kept))


def trajectories(whole: Path, place: Path, count: int) -> Row:
    """Through 02."""
    row = Row("02 over bad trajectories.jsonl")
    lines = (whole / "1_trajectories/trajectories.jsonl").read_bytes().splitlines()[:4]
    records = [json.loads(line) for line in lines]
    bad = mutations(records[0] | {"scene_id": "bad", "traj_id": "BAD"}, count, 2)
    bad = [(name, line.replace(b'"BAD"', b'"b%03d"' % k)) for k, (name, line) in enumerate(bad)] + [("a duplicate", lines[0])]
    good = {(r["scene_id"], r["traj_id"]) for r in records}

    def through(name, data):
        folder = place / name
        before("02", whole, folder)
        path = folder / "1_trajectories/trajectories.jsonl"
        path.unlink()  # it is a link to the good one
        path.write_bytes(data)
        done = run("02", "--run", folder, "--keep", "ends", "--workers", 1, "--sheet_rows", 1)
        views = folder / "2_views/views.jsonl"
        return done, [json.loads(line) for line in views.read_text().splitlines()] if views.is_file() else []
    done, views = through("bad", b"\n".join([*lines, *(line for _, line in bad)]) + b"\n")
    kept = {(view["scene_id"], view["traj_id"]) for view in views}

    def sound(number, line):  # made a view, or was skipped by its name
        try:
            name = json.loads(line)["scene_id"], json.loads(line)["traj_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        return name in kept or f"{name[0]}/{name[1]}: skipped" in done.err or "left out" in done.out
    tell(row, done, bad, len(lines) + 1, kept, good, sound, lambda number, line: f"trajectories.jsonl:{number}: skipped" in done.err)
    plain = b"\n".join(lines) + b"\n"
    unknown = b"".join(json.dumps(record | {"mood": [1, {"x": None}]}).encode() + b"\n" for record in records)
    for name, data in whole_files(plain, unknown).items():
        done, views = through(name, data)
        kept = {(view["scene_id"], view["traj_id"]) for view in views}
        row.case(name, done.success(), done, lost=len(good - kept))
    return row


def views(whole: Path, place: Path, count: int) -> Row:
    """Through 03."""
    row = Row("03 over bad views.jsonl")
    lines = (whole / "2_views/views.jsonl").read_bytes().splitlines()
    record = json.loads(lines[0])
    bad = mutations(record | {"scene_id": record["scene_id"], "traj_id": "BAD"}, count, 3)
    bad = [(name, line.replace(b'"BAD"', b'"b%03d"' % k)) for k, (name, line) in enumerate(bad)] + [("a duplicate", lines[0])]

    def through(name, data):
        folder = before("03", whole, place / name)
        (folder / "2_views/views.jsonl").unlink()
        (folder / "2_views/views.jsonl").write_bytes(data)
        done = run("03", "--run", folder)
        card = folder / "3_qa/card.json"
        asked = [json.loads(line) for name in ("static", "sft", "heldout") for line in (folder / f"3_qa/{name}.jsonl").read_text().splitlines()
                 ] if not done.status else []
        return done, json.loads(card.read_text())["views"] if card.is_file() else {"used": 0, "skipped": {}}, {(q["scene_id"], q["traj_id"]) for q in asked}
    calm, calm_views, good = through("good", b"\n".join(lines) + b"\n")
    done, seen, kept = through("bad", b"\n".join([*lines, *(line for _, line in bad)]) + b"\n")
    named = [number for number in range(len(lines) + 1, len(lines) + len(bad) + 1) if f"views.jsonl:{number}: skipped" in done.err]
    silent = seen["used"] - calm_views["used"] + sum(seen["skipped"].values()) - sum(calm_views["skipped"].values())
    tell(row, done, bad, len(lines) + 1, kept, good, lambda number, line: silent == len(bad), lambda number, line: number in named)  # all are counted
    unknown = b"".join(json.dumps(json.loads(line) | {"mood": [1, {"x": None}]}).encode() + b"\n" for line in lines)
    for name, data in whole_files(b"\n".join(lines) + b"\n", unknown).items():
        done, seen, kept = through(name, data)
        row.case(name, done.success(), done, lost=max(0, calm_views["used"] - seen["used"]) + len(good - kept))
    return row


def questions(stage: str, whole: Path, place: Path, count: int) -> Row:
    """Through 04, 05 or 06."""
    row = Row(f"{stage} over bad questions")
    lines = (whole / "3_qa/heldout.jsonl").read_bytes().splitlines()[:6]
    record = next(r for r in map(json.loads, lines) if len(r["images"]) == 2)
    twist = lambda **change: json.dumps(record | change).encode()
    says = lambda text: [record["messages"][0], {"role": "assistant", "content": text}]
    asks = lambda text: [{"role": "user", "content": text}, record["messages"][1]]
    bad = [("one picture too few", twist(images=record["images"][:1])), ("one too many", twist(images=record["images"] + record["images"][:1])),
           ("out of the root", twist(images=["../../../etc/hostname"] * 2)), ("absolute", twist(images=["/etc/hostname"] * 2)),
           ("missing picture", twist(images=["2_views/none.png"] * 2)), ("a folder", twist(images=["2_views", "2_views"])),
           ("no answer", twist(messages=record["messages"][:1])), ("no role", twist(messages=[{"content": record["messages"][0]["content"]}, record["messages"][1]])),
           ("picture tokens", twist(messages=asks("<image><image><|image_pad|>?"))), ("vision tokens", twist(messages=asks("<image><image><|vision_start|>?"))),
           ("endless text", twist(messages=asks("<image><image>" + "word " * 20_000))), ("surrogate", twist(messages=asks("<image><image>\ud800?"))),
           ("surrogate answer", twist(messages=says("\udfff"))), ("answer outside the grammar", twist(messages=says("perhaps"))), ("unknown task", twist(task_type="Z9")),
           ("empty answer", twist(messages=says("")))] + mutations(record, count - 16, int(stage))

    def through(name, data):
        folder = before(stage, whole, place / name)
        (folder / "all.jsonl").write_bytes(data)
        if stage == "06":
            more = ["--checkpoint", "4_base", "--questions", "all.jsonl", "--tag", "q", "--max_new_tokens", 2, "--blank", "False", "--max_pixels", 3136]
        else:
            more = ["--student", "4_base", "--data", "all.jsonl", *TINY, "--steps", 1, "--max_pixels", 3136, *(
                ["--batch", data.count(b"\n") + 1, "--val_share", 0] if stage == "04" else ["--prompts", count + 6, "--group", 2, "--max_new_tokens", 2])]
        done = run(stage, "--run", folder, *more)
        return done, folder
    done, folder = through("bad", b"\n".join([*lines, *(line for _, line in bad)]) + b"\n")
    used = question_count(stage, folder, done)

    def sound(number, line):  # what is not named was used: then all numbers add up
        return used is None or used + skipped_count(done) == len(lines) + len(bad)
    tell(row, done, bad, len(lines) + 1, set(), set(), sound, lambda number, line: f"all.jsonl:{number}: skipped" in done.err)
    plain = b"\n".join(lines) + b"\n"
    calm, folder = through("good", plain)
    expected = question_count(stage, folder, calm)
    row.case("all good", calm.success() + (["something is skipped"] if "skipped" in calm.err else []), calm)
    unknown = b"".join(json.dumps(json.loads(line) | {"mood": [1, {"x": None}]}).encode() + b"\n" for line in lines)
    for name, data in whole_files(plain, unknown).items():
        again, folder = through(name, data)
        row.case(name, again.success(), again, lost=max(0, expected - (question_count(stage, folder, again) or 0)))
    return row


def question_count(stage: str, folder: Path, done) -> int | None:
    """How many questions were asked or trained on."""
    if done.status:
        return None
    if stage != "06":
        later = {line for line in done.err.splitlines() if ": skipped," in line and ".jsonl:" not in line}  # read, but could not be put into tokens
        return json.loads((folder / {"04": "4_sft", "05": "5_refine"}[stage] / "meta.json").read_text())["counts"]["questions"] - len(later)
    return len((folder / "6_eval/q/samples.jsonl").read_text().splitlines())


def skipped_count(done) -> int:
    return len({line for line in done.err.splitlines() if "skipped" in line and "lines skipped" not in line})
