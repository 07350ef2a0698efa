"""Compile every kernel ahead of time, without a GPU, and say what it costs on each: `python -m kernels.compile`.

    python -m kernels.compile                                     every kernel for sm_80, sm_90, sm_100 and gfx942
    python -m kernels.compile --targets sm_90 --only "forward"    some of them
    python -m kernels.compile --markdown --only bf16              the table of kernels/README.md

Columns, and where each figure comes from:
  registers      a thread's; NVIDIA: REG of `cuobjdump --dump-resource-usage` on the cubin (limit 255); AMD: .vgpr_count (limit 512)
  spilled        bytes of a thread's registers that went to memory: "spill stores" of `ptxas -v`; AMD: 4 x .vgpr_spill_count (an AMD
                 scalar register spills into a lane of a vector register, not into memory, so it does not count)
  shared         bytes of shared memory (LDS) of a program
  matrix         the matrix instructions in the assembly: mma (sm_80), wgmma (sm_90), tcgen05 (sm_100), mfma (gfx942), or none

Exit status 1, with a line each, if a case does not compile or cannot be launched for want of shared memory, if a forward kernel
spills, or if a 16-bit forward attention or temporal kernel has no wgmma on sm_90.

A case is (name, kernel, signature, constexprs, options), from `compile_cases()` of a kernel file. Pointers are taken to be divisible by 16,
as torch allocates them; an integer is where its type says so ("i32:16", as in triton's own ahead-of-time tool). A launch specialises both
the same way; without it loads cannot be vectors, and the figures would be those of another kernel.
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

FILES = ("attention", "temporal", "rays")
# name: (backend, architecture, threads in a warp, most shared memory of one program in bytes). The last from the CUDA C++ programming
# guide, "technical specifications per compute capability" (163 and 227 KB), and the CDNA 3 instruction set guide (64 KB).
TARGETS = {"sm_80": ("cuda", 80, 32, 163 << 10), "sm_90": ("cuda", 90, 32, 227 << 10), "sm_100": ("cuda", 100, 32, 227 << 10),
           "gfx942": ("hip", "gfx942", 64, 64 << 10)}
MATRIX = {"tcgen05": r"\btcgen05\.mma\b", "wgmma": r"\bwgmma\.mma_async\b", "mma": r"(?<!g)\bmma\.sync\b", "mfma": r"\bv_s?mfma"}
COLUMNS = ("kernel", "target", "registers", "spilled", "shared", "matrix")


def all_cases() -> dict[str, tuple]:
    """Every case of every kernel file by its name: {name: (kernel, signature, constexprs, options)}."""
    cases = [case for file in FILES for case in importlib.import_module(f"kernels.{file}").compile_cases()]
    names = [case[0] for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two cases of one name: {twice}: name what tells them apart in compile_cases()")
    return {name: rest for name, *rest in cases}


def spilled_bytes(ptx: str, arch: int) -> int:
    """Spill stores in bytes, as ptxas reports them, with the program and the flags that triton uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        flags = ["-v", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(arch)}", "-o", os.devnull]
        report = subprocess.run([get_ptxas(arch).path, *flags, file.name], capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", report)[1])


def cubin_registers(cubin: bytes) -> int:
    """Registers of a thread, from the cubin itself."""
    from triton import knobs
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", report)[1])


def compile_case(name: str, target: str) -> dict:
    """One row of the table, its keys in COLUMNS. Raises what triton raises if the case does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel, signature, constexprs, options = all_cases()[name]
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("the kernel was imported for the interpreter: unset TRITON_INTERPRET")
    backend, arch, warp, _ = TARGETS[target]
    types, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        kind, _, hint = ("constexpr" if argument in constexprs else signature[argument]).partition(":")
        types[argument] = kind
        if kind.startswith("*") or hint == "16":
            attributes[place,] = [["tt.divisibility", 16]]
            if kind.startswith("*") and backend == "hip":  # a tensor below 2 GB: what a launch says of it, for 32-bit buffer loads
                attributes[place,].append(["tt.pointer_range", 32])
    # enable_fp_fusion: triton 3.9's default, said aloud because 3.10 changes it.
    built = triton.compile(ASTSource(kernel, types, constexprs, attributes), target=GPUTarget(backend, arch, warp),
                           options={"enable_fp_fusion": True, **options})
    if (columns := getattr(built.metadata, "tmem_size", 0) or 0) > 512:
        raise RuntimeError(f"needs {columns} columns of tensor memory, there are 512: smaller blocks")
    text = built.asm["ptx" if backend == "cuda" else "amdgcn"]
    if backend == "cuda":
        registers, spilled = cubin_registers(built.asm["cubin"]), spilled_bytes(text, arch)
    else:
        metadata = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", text, re.M)}
        registers, spilled = metadata["vgpr_count"], 4 * metadata["vgpr_spill_count"]
    matrix = "+".join(word for word, pattern in MATRIX.items() if re.search(pattern, text)) or "none"
    return dict(zip(COLUMNS, (name, target, registers, spilled, built.metadata.shared, matrix)))


def attempt(job: tuple[str, str]) -> dict:
    """compile_case for the pool: a failure becomes the row's `error`, so that the other cases still get theirs."""
    said = io.StringIO()  # triton prints the whole PTX when ptxas refuses it
    try:
        with contextlib.redirect_stdout(said):
            return compile_case(*job)
    except Exception as error:  # whatever a compiler may raise, shown in the table and in the exit status
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return {"kernel": job[0], "target": job[1], "error": f"{type(error).__name__}: {lines[-1][:300]}"}


def compile_all(targets=tuple(TARGETS), only: str = "", processes: int = 2, progress=lambda rows: rows) -> list[dict]:
    """Rows of every case whose name contains `only`, for each target. Fresh processes: they do not inherit this one's threads."""
    jobs = [(name, target) for name in all_cases() if only in name for target in targets]
    rows = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(attempt, job) for job in jobs]
        for job, future in progress(list(zip(jobs, futures))):
            try:
                rows.append(future.result())
            except BrokenProcessPool:  # out of memory, or an abort inside LLVM; the jobs behind it are lost too
                rows.append({"kernel": job[0], "target": job[1], "error": "the compiling process died here or in a case above"})
    return rows


def faults(rows: list[dict]) -> list[str]:
    """What the table must not contain, a line each."""
    lines = []
    for row in rows:
        where = f"{row['kernel']} on {row['target']}"
        if "error" in row:
            lines.append(f"{where}: does not compile: {row['error']}")
            continue
        limit = TARGETS[row["target"]][3]
        if row["shared"] > limit:
            lines.append(f"{where}: needs {row['shared']} bytes of shared memory, there are {limit}")
        if "forward" in row["kernel"] and row["spilled"]:
            lines.append(f"{where}: spills {row['spilled']} bytes of registers")
        needs_wgmma = re.match("(attention|temporal) forward (bf16|fp16)", row["kernel"])  # wgmma has no float32 operands
        if needs_wgmma and row["target"] == "sm_90" and "wgmma" not in row["matrix"]:
            lines.append(f"{where}: has no wgmma (matrix instruction: {row['matrix']})")
    return lines


def table(rows: list[dict]) -> str:
    """Aligned columns, one row a case and target."""
    cells = [COLUMNS] + [[str(row.get(column, "-")) for column in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    left = {"kernel", "target", "matrix"}
    return "\n".join("  ".join(cell.ljust(width) if column in left else cell.rjust(width)
                               for cell, width, column in zip(line, widths, COLUMNS)).rstrip() for line in cells)


def markdown(rows: list[dict]) -> str:
    """A row a case, a column a target: registers / spilled bytes / shared memory in KiB, matrix instruction."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = ["| kernel | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for name in dict.fromkeys(row["kernel"] for row in rows):
        cells = {row["target"]: "does not compile" if "error" in row
                 else f"{row['registers']} / {row['spilled']} / {row['shared'] / 1024:.0f} {row['matrix']}"
                 for row in rows if row["kernel"] == name}
        lines.append(f"| {name} | " + " | ".join(cells[target] for target in targets) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description="Compile every kernel ahead of time, without a GPU.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--processes", type=int, default=2, help="compile in this many processes")
    parser.add_argument("--markdown", action="store_true", help="print the table of kernels/README.md")
    arguments = parser.parse_args()
    try:
        import triton
    except ImportError:
        sys.exit("compiling needs triton, which is published for Linux: pip install triton")
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, so kernels would be interpreted: unset TRITON_INTERPRET to compile them")
    from tqdm import tqdm
    rows = compile_all(arguments.targets, arguments.only, arguments.processes, lambda jobs: tqdm(jobs, "compile", mininterval=2))
    if not rows:
        sys.exit(f"no case's name contains {arguments.only!r}")
    print(markdown(rows) if arguments.markdown else table(rows))
    wrong = faults(rows)
    print("\n".join(wrong), end="\n" if wrong else "")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
