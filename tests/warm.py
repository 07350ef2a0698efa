"""Scripts in forks of a process that has imported torch, transformers and diffusers.

A call costs what the stage does, not the seconds of a start. conftest.py starts this file once and
writes it a line of JSON per call; tests/fire forks itself. A process that is forked from computes
nothing: its forks would miss the threads of its arithmetic.
"""

import atexit
import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.name[:2]: path for path in sorted(ROOT.glob("0[1-6]_*.py"))}


def warm_up():
    """Import once what every forked script would import again."""
    from PIL import Image

    sys.path.insert(0, str(ROOT))  # kernels/
    pixels = Image.MAX_IMAGE_PIXELS
    for script in SCRIPTS.values():
        runpy.run_path(str(script), run_name="warm")
    Image.MAX_IMAGE_PIXELS = pixels  # 01 sets a limit that is not the others'
    for name in (
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
        "transformers.models.clip.modeling_clip",
        "diffusers.pipelines.auto_pipeline",
        "torch.distributed.checkpoint",
        "matplotlib.backends.backend_agg",
        "matplotlib.pyplot",
    ):
        importlib.import_module(name)


def become(script: Path, arguments: list[str], plant, outputs: list[int]):
    """Never returns: this forked process runs the script and ends as Python would end.

    plant: called first; outputs: file descriptors that become stdout and stderr.
    """
    status = 1
    try:
        atexit._clear()  # what the parent wants done at its end is not this process's to do
        for number, fd in enumerate(outputs, 1):
            os.dup2(fd, number)
            os.close(fd)
        sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
        if plant:
            plant()
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # the interpreter's own last resort, which prints a traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        multiprocessing.util._exit_function()
        os._exit(status)


def answer(folder: str, name: str, number: int):
    """Write a number under a temporary name, then rename: whoever sees the file can read it."""
    part = Path(folder, f"{name}.part")
    part.write_text(str(number))
    part.rename(part.with_suffix(""))


def keep(script: str, arguments: list[str], environment: dict, plant: str, folder: str):
    """Never returns: fork the script, and write its process id and its exit status to `folder`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    outputs = [os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT) for name in ("out", "err")]
    if not (pid := os.fork()):
        become(Path(script), arguments, partial(exec, plant, {}), outputs)
    answer(folder, "pid", pid)
    answer(folder, "status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def main():
    warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    # a call at a time, never more: what is read ahead would be the forks' as well
    while line := sys.stdin.readline():
        if not os.fork():
            keep(**json.loads(line))


if __name__ == "__main__":
    main()
