"""Compile every kernel ahead of time, without a GPU, and say what it costs on each card.

    python tests/gpu/compile.py                                     for sm_80, sm_90, sm_100, gfx942
    python tests/gpu/compile.py --targets sm_90 --only "forward"    some of them
    python tests/gpu/compile.py --markdown --only bf16              as a Markdown table

Columns, and where each figure comes from:
  registers   of a thread; NVIDIA: REG of `cuobjdump --dump-resource-usage` on the cubin (limit
              255); AMD: .vgpr_count (limit 512)
  spilled     bytes of a thread's registers that went to memory: "spill stores" of `ptxas -v`; AMD:
              4 x .vgpr_spill_count (an AMD scalar register spills into a lane of a vector register,
              not into memory, so it does not count)
  shared      bytes of shared memory (LDS) of a program
  matrix      the matrix instructions in the assembly: mma (sm_80), wgmma (sm_90), tcgen05 (sm_100),
              mfma (gfx942), or none

Exit status 1, with a line each, if a case does not compile or cannot be launched for want of shared
memory, if a forward kernel spills, or if a 16-bit forward attention or temporal kernel has no wgmma
on sm_90.

A case of cases.py is (name, kernel, argument types, constants, options). Pointers are taken to be
divisible by 16, as torch allocates them; an integer is where its type says so ("i32:16", as in
triton's own ahead-of-time tool). A launch specialises both the same way; without it loads cannot be
vectors, and the figures would be those of another kernel.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]  # kernels/, cases.py
all_cases = importlib.import_module("cases").all_cases

# name: (backend, architecture, threads in a warp, most shared memory of one program in bytes). The
# last from the CUDA C++ programming guide, "technical specifications per compute capability" (163
# and 227 KB), and the CDNA 3 instruction set guide (64 KB).
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 << 10),
    "sm_90": ("cuda", 90, 32, 227 << 10),
    "sm_100": ("cuda", 100, 32, 227 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
}
MATRIX = {
    "tcgen05": r"\btcgen05\.mma\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma": r"(?<!g)\bmma\.sync\b",
    "mfma": r"\bv_s?mfma",
}
COLUMNS = ("kernel", "target", "registers", "spilled", "shared", "matrix")


def report_of(command: list[str], content: bytes, suffix: str) -> str:
    """What a program prints about a file with this content."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def spilled_bytes(ptx: str, arch: int) -> int:
    """Spill stores, as ptxas reports them with the flags that triton uses for this card."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    card = f"--gpu-name={sm_arch_from_capability(arch)}"
    ptxas = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", card, "-o", os.devnull]
    return int(re.search(r"(\d+) bytes spill stores", report_of(ptxas, ptx.encode(), ".ptx"))[1])


def cubin_registers(cubin: bytes) -> int:
    """Registers of a thread, from the cubin itself."""
    from triton import knobs

    cuobjdump = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage"]
    return int(re.search(r"REG:(\d+)", report_of(cuobjdump, cubin, ".cubin"))[1])


def compile_case(name: str, target: str) -> dict:
    """One row of the table, its keys in COLUMNS. Raises what triton raises on a failure."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, options = all_cases()[name]
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("the kernel was imported for the interpreter: unset TRITON_INTERPRET")
    backend, arch, warp, _ = TARGETS[target]
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        full = "constexpr" if argument in constants else types[argument]
        kind, _, hint = full.partition(":")
        signature[argument] = kind
        if kind.startswith("*") or hint == "16":
            attributes[place,] = [["tt.divisibility", 16]]
        if kind.startswith("*") and backend == "hip":
            # A tensor below 2 GB: what a launch says of it, for 32-bit buffer loads.
            attributes[place,].append(["tt.pointer_range", 32])
    # enable_fp_fusion: triton 3.9's default, said aloud because 3.10 changes it.
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget(backend, arch, warp),
        options={"enable_fp_fusion": True, **options},
    )
    columns = getattr(built.metadata, "tmem_size", 0) or 0
    if columns > 512:
        raise RuntimeError(f"needs {columns} columns of tensor memory of 512: smaller blocks")
    if backend == "cuda":
        text = built.asm["ptx"]
        registers, spilled = cubin_registers(built.asm["cubin"]), spilled_bytes(text, arch)
    else:
        text = built.asm["amdgcn"]
        metadata = dict(re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", text, re.M))
        registers, spilled = int(metadata["vgpr_count"]), 4 * int(metadata["vgpr_spill_count"])
    matrix = "+".join(word for word, pattern in MATRIX.items() if re.search(pattern, text))
    row = (name, target, registers, spilled, built.metadata.shared, matrix or "none")
    return dict(zip(COLUMNS, row, strict=True))


def attempt(job: tuple[str, str]) -> dict:
    """compile_case for the pool: a failure becomes the row's `error`; the others go on."""
    said = io.StringIO()  # triton prints the whole PTX when ptxas refuses it
    try:
        with contextlib.redirect_stdout(said):
            return compile_case(*job)
    except Exception as error:  # whatever a compiler may raise; the table and exit status show it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        said = f"{type(error).__name__}: {lines[-1][:300]}"
        return {"kernel": job[0], "target": job[1], "error": said}


def compile_all(jobs: list[tuple[str, str]], processes: int = 2, progress=list) -> list[dict]:
    """A row per job, which is a case and a target.

    Fresh processes: they do not inherit this one's threads.
    """
    rows = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(attempt, job) for job in jobs]
        for (name, target), future in progress(list(zip(jobs, futures, strict=True))):
            try:
                rows.append(future.result())
            except BrokenProcessPool:  # out of memory, or an abort inside LLVM; later jobs are lost
                said = "the compiling process died here or in a case above"
                rows.append({"kernel": name, "target": target, "error": said})
    return rows


def faults(rows: list[dict]) -> list[str]:
    """What the table must not contain, a line each."""
    lines = []
    for row in rows:
        where = f"{row['kernel']} on {row['target']}"
        if "error" in row:
            lines.append(f"{where}: does not compile: {row['error']}")
            continue
        shared, limit = row["shared"], TARGETS[row["target"]][3]
        if shared > limit:
            lines.append(f"{where}: needs {shared} bytes of shared memory, there are {limit}")
        if "forward" in row["kernel"] and row["spilled"]:
            lines.append(f"{where}: spills {row['spilled']} bytes of registers")
        # wgmma has no float32 operands.
        needs_wgmma = re.match("(attention|temporal) forward (bf16|fp16)", row["kernel"])
        if needs_wgmma and row["target"] == "sm_90" and "wgmma" not in row["matrix"]:
            lines.append(f"{where}: has no wgmma (matrix instruction: {row['matrix']})")
    return lines


def table(rows: list[dict]) -> str:
    """Aligned columns, one row per case and target."""
    columns = []
    for name in COLUMNS:
        cells = [name, *(str(row.get(name, "-")) for row in rows)]
        width = max(map(len, cells))
        left = name in ("kernel", "target", "matrix")
        columns.append([cell.ljust(width) if left else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def markdown(rows: list[dict]) -> str:
    """A row per case, a column per target: registers / spilled / KiB shared, matrix instruction."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    cells = {name: {} for name in dict.fromkeys(row["kernel"] for row in rows)}
    for row in rows:
        cell = "does not compile"
        if "error" not in row:
            kib = f"{row['shared'] / 1024:.0f}"
            cell = f"{row['registers']} / {row['spilled']} / {kib} {row['matrix']}"
        cells[row["kernel"]][row["target"]] = cell
    lines = [["kernel", *targets], ["---"] * (len(targets) + 1)]
    lines += [[name, *(of[target] for target in targets)] for name, of in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description="Compile every kernel, without a GPU.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--processes", type=int, default=2, help="compile in this many processes")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    try:
        import triton
    except ImportError:
        sys.exit("compiling needs triton, which is published for Linux: pip install triton")
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set and nothing would be compiled: unset TRITON_INTERPRET")
    from tqdm import tqdm

    def progress(jobs):
        return tqdm(jobs, "compile", mininterval=2)

    names = [name for name in all_cases() if arguments.only in name]
    if not names:
        sys.exit(f"no case's name contains {arguments.only!r}")
    jobs = [(name, target) for name in names for target in arguments.targets]
    rows = compile_all(jobs, arguments.processes, progress)
    print(markdown(rows) if arguments.markdown else table(rows))
    wrong = faults(rows)
    print("\n".join(wrong), end="\n" if wrong else "")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
