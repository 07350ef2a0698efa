"""What every attack uses: a script run in a forked process with a fault planted in it, small runs to attack, and the tally.

A script runs as under `python 0N_….py` (runpy, its own __main__), but in a fork of this process, which has imported torch and
transformers already: a case costs what the stage does, not the five seconds of a start. This process itself computes nothing.
"""
import atexit
import importlib
import json
import multiprocessing.util
import os
import re
import resource
import runpy
import selectors
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.name[:2]: path for path in sorted(ROOT.glob("0[1-6]_*.py"))}
MEMORY = 12 * 2**30  # bytes of address space of an attacked process: a bomb that goes off shall hurt nobody else
TINY = ["--train", "full", "--freeze_vision", "False", "--lr", "1e-3", "--no_checkpointing"]


# --- the tally -------------------------------------------------------------------------------------------------------------------------

@dataclass
class Row:
    """One line of the table."""
    attack: str
    tried: int = 0
    survived: int = 0
    lost: int = 0         # good records that are missing in the output
    tracebacks: int = 0
    complaints: list = field(default_factory=list)

    def case(self, name: str, faults: list[str], *outcomes, lost: int = 0):
        """One case: it survived when nothing in `faults` is said of it, no record is lost, and no outcome shows a traceback."""
        traced = [outcome.err[-1500:] for outcome in outcomes if "Traceback (most recent call last)" in outcome.err]
        self.tried += 1
        self.lost += lost
        self.tracebacks += len(traced)
        self.survived += not faults and not traced and not lost
        if faults or traced or lost:
            self.complaints.append(f"{self.attack}, {name}: " + "; ".join([*faults, *traced, *([f"{lost} records lost"] if lost else [])]))


def warm_up():
    """Import here, once, what every forked script would import again; no arithmetic, whose threads a fork would lose."""
    sys.path.insert(0, str(ROOT))  # kernels/
    pixels = Image.MAX_IMAGE_PIXELS
    for script in SCRIPTS.values():
        runpy.run_path(str(script), run_name="warm")
    Image.MAX_IMAGE_PIXELS = pixels  # 01 sets a limit of its own, which is not the others'
    for name in ("transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
                 "torch.distributed.checkpoint", "matplotlib.backends.backend_agg", "matplotlib.pyplot"):
        importlib.import_module(name)


# --- running a script --------------------------------------------------------------------------------------------------------------------

@dataclass
class Outcome:
    status: int  # exit status; -9: killed
    out: str
    err: str
    seconds: float

    def refusal(self, *words: str) -> list[str]:
        """What is wrong with this as a refusal: status 2, and a line by the script that holds all `words`."""
        line = next((line for line in self.err.splitlines() if re.search(r"0[1-6]_\w+\.py: ", line)), "")
        return ([f"status {self.status}, not 2"] if self.status != 2 else []) + [f"{word!r} is not in {line!r}" for word in words if word not in line]

    def success(self) -> list[str]:
        return [] if self.status == 0 else [f"status {self.status}: {self.err.strip()[-600:]}"]


def run(stage: str, *arguments, plant=None, kill_after_s: float | None = None, limit_s: float = 300) -> Outcome:
    """A stage with these arguments, after plant() in its process; SIGKILL to its first process after `kill_after_s`, or when it hangs."""
    pipes, started = [os.pipe(), os.pipe()], time.time()
    sys.stdout.flush(), sys.stderr.flush()
    if not (pid := os.fork()):
        become(SCRIPTS[stage], [str(a) for a in arguments], plant, [write for _, write in pipes])
    said, moment = {read: b"" for read, _ in pipes}, kill_after_s
    with selectors.DefaultSelector() as selector:
        for read, write in pipes:
            os.close(write)
            selector.register(read, selectors.EVENT_READ)
        while selector.get_map():
            wait = (limit_s if moment is None else moment) - (time.time() - started)
            if wait <= 0:
                os.kill(pid, signal.SIGKILL)
                moment = limit_s = 1e9
            for key, _ in selector.select(max(0, min(wait, 1e6))):
                if chunk := os.read(key.fd, 65536):
                    said[key.fd] += chunk
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (text.decode(errors="replace") for text in said.values())
    return Outcome(status, out, err, time.time() - started)


def become(script: Path, arguments: list[str], plant, outputs: list[int]):
    """Never returns: this forked process runs the script and ends as Python would end."""
    status = 1
    try:
        atexit._clear()  # what the parent wants done at its end is not this process's to do
        for number, fd in enumerate(outputs, 1):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, errors="backslashreplace")
        sys.argv = [str(script), *arguments]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if plant:
            plant()
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # this is the interpreter's own last resort, which prints a traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        multiprocessing.util._exit_function()
        os._exit(status)


# --- faults in the file system ---------------------------------------------------------------------------------------------------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def changes(folder: Path, meet):
    """Call meet(n, event, path) before the n-th change below `folder` in this process: opening to write, renaming, deleting, making a folder.

    safetensors writes from Rust, out of Python's sight: its function is wrapped, so that it announces its file too.
    """
    prefix, count = str(folder.resolve()), [0]

    def hook(event, arguments):
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.path.realpath(os.fspath(arguments[0]))
        if path.startswith(prefix + os.sep) or path == prefix:
            number, count[0] = count[0], count[0] + 1
            meet(number, event, path)

    def announced(tensors, filename, **more):
        sys.audit("open", os.fspath(filename), "wb", os.O_WRONLY | os.O_CREAT)
        return serialize(tensors, filename, **more)

    serialize, safetensors.torch.serialize_file = safetensors.torch.serialize_file, announced
    sys.addaudithook(hook)


def record_changes(folder: Path, log: Path):
    """plant: note every change as [event, path, size before, size after]; the size after shows at the next change or at the end."""
    pending, into = [], os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def flush():
        if pending:
            event, path, before = pending.pop()
            os.write(into, (json.dumps([event, path, before, os.path.getsize(path) if os.path.isfile(path) else 0]) + "\n").encode())

    def meet(number, event, path):
        flush()
        pending.append((event, path, os.path.getsize(path) if event == "open" and os.path.isfile(path) else 0))

    changes(folder, meet)
    atexit.register(flush)
    end = multiprocessing.util._exit_function
    multiprocessing.util._exit_function = lambda: (flush(), end())


def die_at(folder: Path, moment: int, halfway: tuple[int, int] | None):
    """plant: die before the change number `moment`; with (size before, size after) in the midst of the write that follows it.

    The midst is the kernel's: beyond the limit on the size of a file a process gets SIGXFSZ in its write call and ends there.
    """
    def meet(number, event, path):
        if number == moment and halfway is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif number == moment:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            before, after = halfway
            resource.setrlimit(resource.RLIMIT_FSIZE, (before + (after - before) // 2,) * 2)
    changes(folder, meet)


def fail_from(folder: Path, moment: int, number: int):
    """plant: from the change number `moment` on, every one raises OSError(number), as when a disk turns read-only."""
    def meet(at, event, path):
        if at >= moment:
            raise OSError(number, os.strerror(number), path)
    changes(folder, meet)


def full_at(folder: Path, moment: int, before: int, after: int):
    """plant: in the midst of the write after the change number `moment` there is no more room (the kernel's EFBIG), and none later."""
    def meet(number, event, path):
        if number == moment:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before + (after - before) // 2,) * 2)
    changes(folder, meet)


# --- runs to attack -----------------------------------------------------------------------------------------------------------------------------

STAGES = {  # tiny, and with every kind of file a stage writes
    "01": ["--rooms", "3", "--room_px", "56", "--room_trajectories", "3", "--same_label_share", "1", "--heldout", "0.3"],
    "02": ["--keep", "ends", "--workers", "1", "--sheet_rows", "3"],
    "03": ["--box_step", "10"],
    "04": ["--student", "4_base", *TINY, "--steps", "3", "--batch", "6", "--save_every", "1", "--val_share", "0.4", "--val_every", "2"],
    "05": ["--student", "4_base", *TINY, "--steps", "3", "--prompts", "2", "--group", "2", "--max_new_tokens", "4", "--save_every", "1"],
    "06": ["--checkpoint", "4_base", "--tag", "exam", "--batch", "4", "--max_new_tokens", "3", "--per_task", "1"]}
WRITTEN = {"01": "1_trajectories", "02": "2_views", "03": "3_qa", "04": "4_sft", "05": "5_refine", "06": "6_eval/exam"}
NEEDS = {"01": [], "02": ["1_trajectories"], "03": ["1_trajectories", "2_views"], "04": ["2_views", "3_qa", "4_base"],
         "05": ["2_views", "3_qa", "4_base"], "06": ["2_views", "3_qa", "4_base"]}


def build(folder: Path) -> Path:
    """A run that went undisturbed from 01 to 06; 4_base is a tiny student after one step."""
    if not (folder / "6_eval/exam/meta.json").is_file():
        order = [("01", STAGES["01"]), ("02", STAGES["02"]), ("03", STAGES["03"]),
                 ("04", ["--out", "4_base", "--student", "tiny", *TINY, "--steps", "1", "--batch", "4", "--val_share", "0"]),
                 *[(stage, STAGES[stage]) for stage in ("04", "05", "06")]]
        for stage, settings in order:
            done = run(stage, "--run", folder, *settings)
            if done.status:
                raise SystemExit(f"stage {stage} fails undisturbed: {done.err[-3000:]}")
    return folder


def before(stage: str, whole: Path, folder: Path) -> Path:
    """A fresh run that is as far as `whole` was before `stage`. Pictures and weights are linked: no stage writes into another's folder."""
    for name in NEEDS[stage]:
        shutil.copytree(whole / name, folder / name, copy_function=os.link)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, less what time and speed decide: seconds, an answer's cost, and the pictures and plots of both."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name, data = str(path.relative_to(folder)), path.read_bytes()
            if path.name in ("meta.json", "results.json", "metrics.jsonl", "samples.jsonl"):
                data = json.dumps([read(line) for line in ([data] if path.suffix == ".json" else data.splitlines())]).encode()
            found[name] = b"" if path.name in ("curves.png", "report.html", "accuracy_cost.svg") else data
    return found


SPEEDS = ("seconds", "rollout_seconds", "tokens_s", "tflops", "mfu", "cost", "sha256", "command")  # a log has seconds, a command names its folder


def read(line: bytes):
    """A record less its speeds; half a line, where a run has just been stopped, as it is."""
    try:
        return timeless(json.loads(line))
    except ValueError:
        return line.hex()


def timeless(record):
    if isinstance(record, dict):
        return {key: timeless(value) for key, value in record.items() if key not in SPEEDS}
    return record


def differences(folder: Path, expected: dict[str, bytes]) -> list[str]:
    found = contents(folder)
    return [f"{name} {'is missing' if name not in found else 'is left over' if name not in expected else 'differs'}"
            for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
