"""Probes that never imagine: what of each task can be had without comparing the pictures.

    python tests/shortcuts.py RUN             # a run that is as far as stage 3
    make shortcuts [PHOTOS=folder]            # makes it first: 1,000 rooms, photographs by pan

Each probe sees one thing (PROBES), is fitted on the training questions (sft.jsonl) and scored on
the held-out ones; with fewer than 20 scenes, on every scene after a fit on the others. A probe that
beats the best constant answer by more than its limit, beyond its 95 % interval (bootstrap over
scenes), is a way to answer without looking: it is named, and the status is 1.

What a question offers (lettered options, the statement of A4) is judged piece by piece: a row is
what the probe sees, the motion or box offered, and their products. From the picture alone no probe
could name the letter of what it knows, nor tell whether a statement is true. So what the words of
A4 tell by themselves shows in the columns of the pictures too.

Writes RUN/shortcuts.json and RUN/shortcuts.png; prints a table, task x probe.
"""

import json
import re
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.sparse import hstack
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

# The most by which a probe may beat the best constant, beyond its interval, on any task; boxes with
# words have no limit, because a box, an angle and the field of view are geometry.
LIMIT, UNLIMITED = 0.05, ("boxes and words",)
ONE_PICTURE = ("E1",)  # asks about picture 1: to look at it, and at where it is sharp, is the task
HUES_ON_D4 = 0.60  # the most that hues in the boxes may reach there
CROSS = 20  # scenes; with fewer every scene is held out in turn
LIMIT_CROSS, CROSS_TASKS = 0.10, ("A2", "A4")
MOST, FEWEST = 5000, 40  # questions of a task to fit on; to fit and score at all
DIRECTION, EXACT = ("A1", "A2", "E1"), ("A3", "D3")
BOX = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")
ACTION = re.compile(r"(move|turn) (\w+) ([\d.]+) (?:meters|degrees)")
AHEAD = {"forward": 1, "right": 1j, "backward": -1, "left": -1j}  # z + ix


def told(text: str) -> list[float]:
    """Where the actions of a text end and which way that is, or the corners of its box."""
    if found := BOX.fullmatch(text):
        return [int(side) / 1000 for side in found.groups()] + [0.0] * 4
    place, yaw = 0j, 0.0
    for kind, way, value in ACTION.findall(text):
        if kind == "turn":
            yaw += np.radians(float(value)) * AHEAD[way].imag
        else:
            place += float(value) * AHEAD[way] * np.exp(1j * yaw)
    x, z = place.imag, place.real
    return [x, z, yaw, np.cos(yaw), *np.sign(np.round([x, z, yaw], 6)), float(bool(place))]


class Question:
    """A line of the questions, as the probes see it."""

    def __init__(self, record: dict, run: Path):
        self.choice = record.get("answer_type") == "choice"
        self.name = record["task_type"] + " choice" * self.choice
        self.scene = record["scene_id"]
        self.words = record["messages"][0]["content"].replace("<image>", "")
        self.images = [run / path for path in record["images"]]
        self.boxes = [[int(side) for side in box] for box in BOX.findall(self.words)]
        self.answer = record["messages"][-1]["content"]
        # of E2 the words tell which of two questions it is: nearer or farther, or on which side
        self.form = "nearer" in self.words
        # a choice may be guessed by its letter, or by always taking one option where it is there
        self.letter = self.answer
        options = record.get("options") or []
        self.option = options[ord(self.answer) - 65] if self.choice else self.answer
        self.offered = options
        if record["task_type"] == "A4":
            self.offered = [self.words]
        elif all(re.fullmatch("[a-z]+", option) for option in options):
            self.offered = []  # yes, no, nearer, ...: the word is what a probe has to find
        if self.choice and self.offered in ([], [self.words]):
            self.answer = self.option
        self.right = [option == self.option for option in self.offered]
        if self.offered == [self.words]:
            self.right = [self.option in ("true", "yes")]
        if record["task_type"] in DIRECTION and not self.choice:
            self.answer = " ".join(self.answer.split()[:2])  # the main score is the direction
        found = BOX.fullmatch(self.answer)
        self.truth = np.array(found.groups(), float) if found else None


# --- what a probe sees: features of a question, None where the probe is not for it ---
@lru_cache(maxsize=50_000)
def small(path: Path) -> tuple:
    """(pixels 48 x 48 in 0..1, share of hole pixels per 8 x 8 block, sharpness per 6 x 6 block)."""
    image = Image.open(path).convert("RGB")
    full = np.asarray(image, int)
    hole = (np.abs(full - 127) <= 1).all(-1)
    hole = np.asarray(Image.fromarray(hole).convert("L").resize((8, 8), Image.BOX)) / 255
    grey = full.sum(-1) / 765
    edges = np.zeros_like(grey)
    edges[1:, 1:] = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    edges = np.asarray(Image.fromarray(edges).resize((6, 6), Image.BOX))
    return np.asarray(image.resize((48, 48), Image.BOX)) / 255, hole, edges


def thumbnail(path: Path, side: int = 6) -> np.ndarray:
    picture = small(path)[0]
    return picture.reshape(side, 48 // side, side, 48 // side, 3).mean((1, 3)).ravel()


def palette(path: Path) -> np.ndarray:
    """Shares of 4 x 4 x 4 colours."""
    levels = (small(path)[0] * 3.99).astype(int) @ [16, 4, 1]
    return np.bincount(levels.ravel(), minlength=64) / levels.size


def hues(path: Path, box: list[int]) -> np.ndarray:
    """Histogram of the hues of the vivid pixels in a box."""
    picture = Image.open(path).convert("HSV")
    corners = np.array(box).reshape(2, 2) / 1000 * picture.size
    hue, vivid, _ = np.asarray(picture.crop(corners.ravel().round().astype(int).tolist())).T
    found = np.bincount(hue[vivid > 80] // 16, minlength=16).astype(float)
    return found / max(found.sum(), 1)


def picture_1(q: Question):
    return np.r_[thumbnail(q.images[0], 8), palette(q.images[0])]


def picture_2(q: Question):
    return np.r_[thumbnail(q.images[1], 8), palette(q.images[1])] if len(q.images) > 1 else None


HEADINGS = {}  # picture -> heading in its room as its nearest neighbours elsewhere have it


def headings(q: Question):
    """The headings of both pictures and their difference (cos, sin): the pictures are not compared,
    each is only looked up. Rooms with a compass give the motion away so."""
    if len(q.images) != 2 or not all(path in HEADINGS for path in q.images):
        return None
    yaw_1, yaw_2 = (HEADINGS[path] for path in q.images)
    return np.array([f(yaw) for yaw in (yaw_1, yaw_2, yaw_2 - yaw_1) for f in (np.cos, np.sin)])


def look_up_headings(run: Path):
    """Fill HEADINGS by the 6 x 6 thumbnails of the pictures of all other rooms."""
    known, scenes = {}, {}
    for line in (run / "2_views/views.jsonl").open():
        view = json.loads(line)
        if view["start"]:
            for frame, path in zip(view["kept"], view["frames"], strict=True):
                turned = np.arctan2(view["c2w"][frame][0][2], view["c2w"][frame][0][0])
                known[run / path] = np.radians(view["start"][2]) + turned
                scenes[run / path] = view["scene_id"]
    paths = [*known]
    if not paths:
        return
    X = np.array([thumbnail(path) for path in paths])
    places = np.array([[np.cos(yaw), np.sin(yaw)] for yaw in known.values()])
    names = np.array([scenes[path] for path in paths])
    _, near = NearestNeighbors(n_neighbors=min(30, len(paths))).fit(X).kneighbors(X)
    for i, path in enumerate(paths):
        others = [j for j in near[i] if names[j] != names[i]][:5]
        HEADINGS[path] = np.arctan2(*places[others].mean(0)[::-1]) if others else 0.0


def box_hues(q: Question):
    if len(q.images) != 2 or len(q.boxes) != 2:
        return None
    one, two = (hues(path, box) for path, box in zip(q.images, q.boxes, strict=True))
    return np.r_[np.abs(one - two), np.minimum(one, two).sum(), one, two]


def holes(q: Question):
    return np.concatenate([small(path)[1].ravel() for path in q.images])


def sharpness(q: Question):
    """Where the last picture is sharp: what a teacher made up is often blurred."""
    edges = small(q.images[-1])[2].ravel()
    return edges / max(edges.mean(), 1e-6)


def box_numbers(q: Question):
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", q.words)]
    return np.pad(numbers, (0, max(0, 40 - len(numbers))))[:40]


PROBES = {
    "words": None,  # of the prompt, without boxes
    "boxes and words": box_numbers,
    "picture 1": picture_1,
    "picture 2": picture_2,
    "headings": headings,
    "hues in boxes": box_hues,
    "holes": holes,
    "sharpness": sharpness,
}


# --- what a question offers, judged piece by piece ---
def seen_with(probe: str, q: Question):
    """What a probe sees beside each piece offered [n, F]; of E3 the pieces are pictures."""
    if PROBES[probe] is None or probe == "boxes and words":
        boxes = [box_numbers(q)] if PROBES[probe] else [[]]
        return np.repeat(np.array(boxes, float) / 1000, len(q.offered), 0)
    if len(q.images) < 3:
        seen = PROBES[probe](q)
        return None if seen is None else np.repeat([seen], len(q.offered), 0)
    images, rows = q.images, []
    for image in images[1:]:
        q.images = [images[0], image]
        rows.append(PROBES[probe](q))
    q.images = images
    if any(row is None for row in rows):
        return None
    return np.c_[rows, np.subtract(rows, np.mean(rows, 0))]


def offered(probe: str, parts: list[list[Question]]):
    """A matrix per part, a row for each piece offered: what is seen, said, and their products."""
    saw, said = [], []
    for part in parts:
        rows = [seen_with(probe, q) for q in part]
        if any(row is None for row in rows):
            return None
        saw.append(np.concatenate(rows))
        rows = []
        for q in part:
            pictures = len(q.images) > 2
            each = np.array([told(q.words if pictures else piece) for piece in q.offered])
            apart = each - each.mean(0)  # near misses around the truth would have it in their midst
            rows.append(np.c_[each, apart, np.abs(apart), np.arange(len(each))])
        said.append(np.concatenate(rows))
    varies = saw[0].std(0) > 0 if saw[0].size else []
    saw = [part[:, varies] if len(varies) else part for part in saw]
    if saw[0].shape[1] > 16:
        scale = make_pipeline(StandardScaler(), PCA(min(16, *saw[0].shape), random_state=0)).fit(
            saw[0]
        )
        saw = [scale.transform(part) for part in saw]
    made = []
    for one, two in zip(saw, said, strict=True):
        products = (one[:, :, None] * two[:, None, :8]).reshape(len(one), -1)
        made.append(np.c_[one, two, products].astype(np.float32))
    return made


def judge(learner, X, questions: list[Question]) -> np.ndarray:
    """The score of each question, 0..1: the likeliest piece is the right one; A4: its truth."""
    likely, scores = learner.predict_proba(X)[:, 1], []
    for q in questions:
        own, likely = likely[: len(q.right)], likely[len(q.right) :]
        right = q.right[int(own.argmax())] if len(own) > 1 else (own[0] > 0.5) == q.right[0]
        scores.append(float(right))
    return np.array(scores)


def fit_offered(probe: str, train: list[Question], test: list[Question]):
    """fit_and_score, for what questions offer."""
    scenes = sorted({q.scene for q in train})
    aside = {*scenes[:: 5 if len(scenes) > 9 else 2]}
    parts = [[q for q in train if q.scene not in aside], [q for q in train if q.scene in aside]]
    made = offered(probe, [*parts, test])
    y = np.array([right for q in parts[0] for right in q.right])
    if made is None or len({*y}) < 2 or not parts[1]:
        return None
    best = None
    for learner in learners("", boxes=False, sparse=False):
        learner.fit(made[0], y)
        score = judge(learner, made[1], parts[1]).mean()
        if best is None or score > best[0]:
            best = score, learner
    return judge(best[1], made[2], test)


# --- fit and score ---
def features(probe: str, train: list[Question], test: list[Question]):
    """(matrix to fit on, matrix to score on); None where the probe is not for these questions."""
    dense = [[PROBES[probe](q) for q in part] if PROBES[probe] else [] for part in (train, test)]
    if any(row is None for part in dense for row in part):
        return None
    dense = [np.array(part, np.float32) for part in dense]
    if "words" not in probe:
        return dense
    count = CountVectorizer(ngram_range=(1, 3), min_df=3, token_pattern=r"[\w.]+", binary=True)
    texts = [[BOX.sub("box", q.words) for q in part] for part in (train, test)]
    sparse = [count.fit_transform(texts[0]), count.transform(texts[1])]
    if PROBES[probe] is None:
        return sparse
    return [hstack([one, two / 1000]).tocsr() for one, two in zip(sparse, dense, strict=True)]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (np.r_[np.minimum(x[:2], x[2:]), np.maximum(x[:2], x[2:])].clip(0, 1000) for x in (a, b))
    both = np.prod((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0))
    return float(both / max(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both, 1))


def learners(task: str, boxes: bool, sparse: bool) -> list:
    if boxes:
        return [Ridge(1.0), KNeighborsRegressor(8)]
    if task in EXACT:  # thousands of answers
        return [KNeighborsClassifier(1), KNeighborsClassifier(8)]
    scale = StandardScaler(with_mean=not sparse)
    found = [make_pipeline(scale, LogisticRegression(C=0.03, max_iter=200))]
    found.append(KNeighborsClassifier(8))
    return (
        found if sparse else [*found, HistGradientBoostingClassifier(max_iter=50, random_state=0)]
    )


def marks(learner, X, questions: list[Question]) -> np.ndarray:
    """The score of each question, 0..1."""
    said = learner.predict(X)
    if questions[0].truth is not None:
        return np.array([iou(q.truth, box) for q, box in zip(questions, said, strict=True)])
    return np.array([float(q.answer == one) for q, one in zip(questions, said, strict=True)])


def fit_and_score(probe: str, train: list[Question], test: list[Question]):
    """Scores of the test questions by what did best on a fifth of the training scenes."""
    # of A4 the words alone, whole as they are, may tell
    if len(train[0].offered) > 1 or (train[0].offered and PROBES[probe] not in (None, box_numbers)):
        return fit_offered(probe, train, test)
    made = features(probe, train, test)
    if made is None:
        return None
    X, X_test = made
    boxes = train[0].truth is not None
    y = np.array([q.truth if boxes else q.answer for q in train])
    scenes = sorted({q.scene for q in train})
    aside = {*scenes[:: 5 if len(scenes) > 9 else 2]}
    kept = np.array([q.scene not in aside for q in train])
    left = [q for q, stays in zip(train, kept, strict=True) if not stays]
    if not left or (not boxes and len({*y[kept]}) < 2):
        return None
    best = None
    for learner in learners(train[0].name, boxes, hasattr(X, "tocsr")):
        learner.fit(X[kept], y[kept])
        score = marks(learner, X[~kept], left).mean()
        if best is None or score > best[0]:
            best = score, learner
    return marks(best[1], X_test, test)


def best_constant(test: list[Question]) -> float:
    if test[0].truth is not None:
        median = np.median([q.truth for q in test], 0)
        return float(np.mean([iou(q.truth, median) for q in test]))
    right = 0
    for form in (False, True):
        guesses = [[q.letter if q.choice else q.answer for q in test if q.form == form]]
        guesses.append([q.option for q in test if q.form == form])
        right += max(max(map(said.count, {*said}), default=0) for said in guesses)
    return right / len(test)


def half_interval(scores: np.ndarray, scenes: list[str], draws: int = 500) -> float:
    """Half of the 95 % interval of the mean, scenes drawn with replacement."""
    rng, groups = np.random.default_rng(0), {}
    for score, scene in zip(scores, scenes, strict=True):
        groups.setdefault(scene, []).append(score)
    sums = np.array([[sum(group), len(group)] for group in groups.values()])
    means = []
    for _ in range(draws):
        drawn = sums[rng.integers(len(sums), size=len(sums))].sum(0)
        means.append(drawn[0] / drawn[1])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(high - low) / 2


def splits(questions: dict[str, list[Question]]):
    """[(to fit on, to score on)]: the files as they are, or each scene in turn."""
    everything = questions["sft"] + questions["heldout"]
    scenes = sorted({q.scene for q in everything})
    if len(scenes) >= CROSS:
        return [(questions["sft"], questions["heldout"])]
    return [
        ([q for q in everything if q.scene != scene], [q for q in everything if q.scene == scene])
        for scene in scenes
    ]


def probe_run(run: Path, folder: str = "3_qa") -> dict:
    """{task: {"n", "constant", probe: [score, half interval]}}"""
    questions = {}
    for name in ("sft", "heldout"):
        lines = (run / folder / f"{name}.jsonl").read_text().splitlines()
        questions[name] = [Question(json.loads(line), run) for line in lines]
    look_up_headings(run)
    found, rng = {}, np.random.default_rng(0)
    for task in sorted({q.name for q in questions["sft"]}):
        of_task = {name: [q for q in part if q.name == task] for name, part in questions.items()}
        folds = [(train, test) for train, test in splits(of_task) if train and test]
        tested = [q for _, test in folds for q in test]
        if len(tested) < FEWEST or min((len(train) for train, _ in folds), default=0) < FEWEST:
            print(f"{task}: too few questions to probe ({len(tested)} held out)", file=sys.stderr)
            continue
        row = {"n": len(tested), "constant": best_constant(tested)}
        for probe in PROBES:
            scores = []
            for train, test in folds:
                few = rng.permutation(len(train))[:MOST]
                scores.append(fit_and_score(probe, [train[i] for i in few], test))
            if all(part is not None for part in scores):
                scores = np.concatenate(scores)
                half = half_interval(scores, [q.scene for q in tested])
                row[probe] = [float(scores.mean()), half]
        found[task] = row
        print(table({task: row}).splitlines()[-1], flush=True)
    return found


def violations(found: dict, cross: bool) -> list[str]:
    over = []
    for task, row in found.items():
        for probe in PROBES.keys() - {*UNLIMITED}:
            if task.split()[0] in ONE_PICTURE and probe in ("picture 1", "sharpness"):
                continue
            score, half = row.get(probe, (0.0, 0.0))
            allowed = row["constant"] + LIMIT + half
            if cross:
                allowed = row["constant"] + LIMIT_CROSS if task.split()[0] in CROSS_TASKS else 1.0
            if task.split()[0] == "D4" and probe == "hues in boxes":
                allowed = HUES_ON_D4
            if score > allowed:
                over.append(f"{task} by {probe}: {score:.3f}, at most {allowed:.3f}")
    return sorted(over)


def table(found: dict) -> str:
    head = f"| task | n | best constant | {' | '.join(PROBES)} |"
    rows = [head, "|---" * (len(PROBES) + 3) + "|"]
    for task, row in found.items():
        cells = []
        for probe in PROBES:
            cells.append(f"{row[probe][0]:.3f} ± {row[probe][1]:.3f}" if probe in row else "")
        rows.append(f"| {task} | {row['n']} | {row['constant']:.3f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(found: dict) -> Figure:
    """How far each probe is above the best constant."""
    figure = Figure(figsize=(2 + 0.6 * len(found), 5), layout="constrained")
    panel = figure.add_subplot(ylabel="score - best constant answer", title="Without imagining")
    for k, probe in enumerate(PROBES):
        shown = [(i, row) for i, row in enumerate(found.values()) if probe in row]
        x = [i + (k - 3.5) / 10 for i, _ in shown]
        y = [row[probe][0] - row["constant"] for _, row in shown]
        panel.errorbar(x, y, [row[probe][1] for _, row in shown], fmt="o", ms=3, label=probe)
    panel.set_xticks(range(len(found)), [*found], rotation=60)
    panel.axhline(0, color="grey")
    panel.legend(fontsize=7)
    return figure


def main(run: Path):
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    warnings.filterwarnings("ignore", message="The number of unique classes")
    print("\n".join(table({}).splitlines()))
    found = probe_run(run)
    scenes = {json.loads(line)["scene_id"] for line in (run / "3_qa/sft.jsonl").open()}
    over = violations(found, len(scenes) < CROSS)
    (run / "shortcuts.json").write_text(json.dumps({"tasks": found, "over": over}, indent=1))
    draw(found).savefig(run / "shortcuts.png", dpi=110)
    print(f"{run}/shortcuts.json, shortcuts.png")
    for line in over:
        print(f"a shortcut: {line}", file=sys.stderr)
    sys.exit(bool(over))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "3_qa/sft.jsonl").is_file():
        sys.exit(f"{__doc__}\n{sys.argv[1:]}: want a run folder with 3_qa/sft.jsonl")
    main(Path(sys.argv[1]))
