"""Gates on what the compilers make of the kernels: no GPU is needed, and no speed is asserted.

CUDA, for sm_80 and sm_90: no spills, no stack, registers within tests/gates/registers.txt, 16-byte global accesses
for every array, no generic accesses. CPU: every hot loop is reported as vectorised. The flags are the build's own.

After a change that is worth more registers:  python tests/test_gates.py > tests/gates/registers.txt
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

from native_build import CUDA_SOURCES, CXX_FLAGS, CXX_OPTIONAL, NVCC_FLAGS  # noqa: E402
from toolchain import Missing, find_cxx, find_nvcc, gencode_flags  # noqa: E402

pytestmark = pytest.mark.slow

ARCHS = ("8.0", "9.0")
KEEP = ("-Xptxas=-v", "--keep")  # .ci/run builds with these too, for both, and names the folder in BREGMAN_TEST_KEPT
REGISTERS = ROOT / "tests/gates/registers.txt"
PACKS = {"float": 1, "double": 1, "bits16": 2}  # 16-byte packs of state per pack of parameter
SPACES = ("global", "shared", "param", "local", "const")


def entries(header: str) -> list[str]:
    """The functors that rule_list.h or penalty_list.h names."""
    return re.findall(r"^  X\((\w+), \w+\)", (ROOT / "csrc/math" / header).read_text(), re.MULTILINE)


RULES, PENALTIES = entries("rule_list.h"), entries("penalty_list.h")


def constant(rule: str, name: str) -> int:
    """A constexpr member of a rule, read from its header."""
    for header in (ROOT / "csrc/math/point.h", *(ROOT / "csrc/math/rules").glob("*.h")):
        text = header.read_text()
        if own := re.search(rf"^struct {rule} (?:: (\w+) )?", text, re.MULTILINE):
            if found := re.search(rf"{name} = (\w+);", text):
                return {"true": 1, "false": 0}[found.group(1)] if found.group(1).isalpha() else int(found.group(1))
            return constant(own.group(1), name)
    raise LookupError(rule)


# Walker, rule and dtype of every kernel.
KEYS = [*itertools.product(("separable", "tile"), RULES, PACKS), ("budget", "-", "-")]


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"bregman::(\w+::)?", "", line) for line in done.stdout.splitlines()]


# ---------------------------------------------------------------- CUDA


@dataclass
class Kernel:
    """One compiled kernel: ptxas's report, and its memory instructions counted."""

    arch: str
    walker: str
    rule: str
    dtype: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    memory: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return f"{self.walker}<{self.rule}, {self.dtype}> sm_{self.arch.replace('.', '')}"

    def wide(self, access: str) -> int:
        """How many 16-byte accesses ("ld" or "st") to global memory it has."""
        pattern = re.compile(rf"{access}\.global\.(\w+\.)*(v4\.[fub]32|v2\.[fub]64|b128)$")
        return sum(n for op, n in self.memory.items() if pattern.match(op))

    def generic(self) -> list[str]:
        return [op for op in self.memory if not any(part.split("::")[0] in SPACES for part in op.split("."))]


def memory_instructions(ptx: str) -> dict[str, Counter[str]]:
    """Loads, stores and atomics of every kernel in a PTX file."""
    found = {}
    for part in re.split(r"^\.visible \.entry |^\.weak \.entry |^\.entry ", ptx, flags=re.MULTILINE)[1:]:
        operations = re.findall(r"^\s*(?:@!?%p\d+\s+)?((?:ld|st|atom|red)\.[\w.:]+)", part, re.MULTILINE)
        found[re.match(r"\w+", part).group()] = Counter(operations)
    return found


def compile_all(folder: Path) -> None:
    """Leaves what nvcc keeps of the kernels, and its logs, in `folder`."""
    files = [file for pattern in CUDA_SOURCES for file in sorted(ROOT.glob(pattern))]
    sources = [file for file in files if "__global__" in file.read_text()]
    command = [find_nvcc().path, *NVCC_FLAGS, *gencode_flags(list(ARCHS)), "-Icsrc", *KEEP, f"--keep-dir={folder}"]

    def compile_one(source: Path) -> None:
        full = [*command, "--threads=2", "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log
        (folder / f"{source.stem}.log").write_text(log)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources))


def read_kernels(folder: Path) -> list[Kernel]:
    """The kernels of a build with the flags KEEP: one PTX serves all architectures."""
    reports = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
        "".join(file.read_text() for file in folder.glob("*.log")),
    )
    memory = memory_instructions("".join(file.read_text() for file in folder.glob("*.ptx")))
    kernels = []
    names = demangled([report[0] for report in reports])
    for (symbol, arch, stack, stores, loads, registers), name in zip(reports, names, strict=True):
        walker, rule, dtype = re.search(r"(\w+)_kernel(?:<(\w+), (\w+)>)?", name).groups("-")
        spills = int(stores) + int(loads)
        arch = f"{arch[:-1]}.{arch[-1]}"
        kernels.append(Kernel(arch, walker, rule, dtype, int(registers), int(stack), spills, memory[symbol]))
    return kernels


def budgets() -> dict[tuple[str, ...], int]:
    """Registers by (walker, rule, dtype, architecture)."""
    rows = [line.split() for line in REGISTERS.read_text().splitlines() if line and line[0] != "#"]
    return {(*row[:3], arch): int(limit) for row in rows for arch, limit in zip(ARCHS, row[3:], strict=True)}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    if kept := os.environ.get("BREGMAN_TEST_KEPT"):
        return read_kernels(Path(kept))
    try:
        find_nvcc()
    except Missing as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("cuda")
    compile_all(folder)
    return read_kernels(folder)


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    assert {(k.walker, k.rule, k.dtype, k.arch) for k in kernels} == {(*key, arch) for key in KEYS for arch in ARCHS}


def test_no_spills_and_no_stack(kernels: list[Kernel]) -> None:
    assert [f"{k.name}: {k.stack} bytes stack, {k.spills} spilled" for k in kernels if k.stack or k.spills] == []


def test_registers_are_within_the_budget(kernels: list[Kernel]) -> None:
    limits = budgets()
    over = [(k, limits.get((k.walker, k.rule, k.dtype, k.arch), 0)) for k in kernels]
    assert [f"{k.name}: {k.registers} registers, budget {limit}" for k, limit in over if k.registers > limit] == []


def test_global_accesses_are_16_bytes_wide(kernels: list[Kernel]) -> None:
    """A kernel reads the gradient and its state, and writes parameter and state, in 16-byte pieces."""
    narrow = []
    for k in kernels:
        if k.rule == "-":  # a number per group, not arrays
            continue
        slots, reads_param = constant(k.rule, "kStateSlots"), constant(k.rule, "kReadsParam")
        master = reads_param and PACKS[k.dtype] == 2
        state = PACKS[k.dtype] * (slots + master)
        fixed = PACKS[k.dtype] * constant(k.rule, "kFixedSlots")
        loads, stores = 1 + state + (reads_param and not master), 1 + state - fixed
        if k.wide("ld") < loads or k.wide("st") < stores:
            narrow.append(f"{k.name}: {k.wide('ld')} of {loads} loads, {k.wide('st')} of {stores} stores")
    assert narrow == []


def test_no_generic_accesses(kernels: list[Kernel]) -> None:
    assert [f"{k.name}: {k.generic()}" for k in kernels if k.generic()] == []


def test_the_ptx_reader_sees_generic_and_narrow_accesses() -> None:
    lines = ("ld.global.nc.v4.f32 {%f1};", "@%p1 st.v4.f32 [%rd1], {%f1};", "ld.global.v2.u32 %r1;")
    ptx = "\n".join((".visible .entry f(", ")", "{", *lines, "}"))
    kernel = Kernel("9.0", "x", "y", "float", memory=memory_instructions(ptx)["f"])
    assert kernel.generic() == ["st.v4.f32"]
    assert (kernel.wide("ld"), kernel.wide("st")) == (1, 0)


# ---------------------------------------------------------------- CPU

# The functions that hold the loops, by file and template arguments.
COMMON = ("NoPenalty", "L1")  # the elementwise penalties that rules are compiled with
HALF_SPACE = tuple(rule for rule in RULES if constant(rule, "kHalfSpace"))
TWICE = tuple(rule for rule in RULES if not constant(rule, "kMetric"))  # rules whose group loops recompute points
BUFFERED = tuple(rule for rule in RULES if rule not in HALF_SPACE)  # rules that may finish from points in a buffer
PLAIN = tuple(rule for rule in TWICE if rule not in HALF_SPACE)
METRIC = tuple(rule for rule in RULES if constant(rule, "kMetric"))
LATE = {rule for rule in RULES if constant(rule, "kLate")}
ONE_ARRAY = {rule for rule in PLAIN if constant(rule, "kReadsParam") + constant(rule, "kStateSlots") == 1}
READING = {rule for rule in RULES if constant(rule, "kReadsParam")}
STREAMED = ("false", "true")  # whether parameters are written past the caches
COMPUTE = ("float", "double")  # what loops compute in
NARROW = ("bf16", "fp16")
FUNCTIONS = {
    "widen_all": ("stored.h", NARROW),
    "narrow_all": ("stored.h", NARROW),
    "clear_masked": ("stored.h", COMPUTE),
    "separable_block": ("loops.h", STREAMED, RULES, COMMON, COMPUTE),
    "advance_run": ("loops.h", PLAIN, COMMON, COMPUTE),
    "advance_rows": ("loops.h", ("1", "4"), PLAIN, COMMON, COMPUTE),
    "advance_pairs": ("loops.h", HALF_SPACE, COMPUTE),
    "finish_block": ("loops.h", STREAMED, TWICE, COMMON, COMPUTE),
    "advance_points": ("loops.h", ("false", "true"), RULES, COMPUTE),
    "finish_points": ("loops.h", ("false", "true"), BUFFERED, COMPUTE),
    "prox_points": ("points.h", PENALTIES[1:], COMPUTE),
    "prox_each": ("points.h", PENALTIES[1:] if METRIC else (), COMPUTE),
    "add_squares": ("points.h", COMPUTE),
    "add_products": ("points.h", COMPUTE),
    "add_pairs": ("group_prox.h", ("CurveTerms", "GainTerms"), COMPUTE),
    "add_moments": ("group_prox.h", COMPUTE),
    "move_up": ("group_prox.h", COMPUTE),
}


def is_missing(function: str, instance: tuple[str, ...]) -> bool:
    """Whether the loop only copies, which GCC hands to memcpy (a late rule's point is its dual as it is stored); takes
    several rows, which is for rules that read one array beside the gradient; sums for a metric that is none; or writes
    past the caches what it reads."""
    if function in ("separable_block", "finish_block"):
        if instance[0] == "true" and instance[1] in READING:
            return True
        instance = instance[1:]
    if function == "advance_rows":
        return instance[0] != "1" and instance[1] not in ONE_ARRAY
    if function == "advance_points":
        return instance[1] in LATE if instance[0] == "false" else instance[1] not in METRIC
    if instance[0] in HALF_SPACE:
        return "L1" in instance  # they take no penalty on elements
    return function == "advance_run" and instance[0] in LATE and "L1" not in instance


def loop_lines(file: str, function: str) -> set[int]:
    """Line numbers of the loops marked for vectorisation in the body of a function template."""
    lines = (ROOT / "csrc/cpu" / file).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.search(rf"^\S.*\b{function}\(", line))
    end = next(i for i in range(start, len(lines)) if lines[i] == "}")
    return {i + 2 for i in range(start, end) if lines[i] == "#pragma GCC ivdep"}


def read_dump(text: str) -> set[tuple[str, str, int]]:
    """(function, file, line) of every loop in csrc/cpu that GCC vectorised."""
    seen = set()
    function = ""
    for line in text.splitlines():
        if header := re.match(r";; Function .*\((\w+)", line):
            function = header.group(1)
        elif note := re.match(r"\S*cpu/(\w+\.h):(\d+):\d+: optimized: +loop vectorized", line):
            seen.add((function, note.group(1), int(note.group(2))))
    names = sorted({name for name, _, _ in seen})
    plain = dict(zip(names, demangled(names), strict=True))
    return {(plain[name], file, line) for name, file, line in seen}


@dataclass
class CpuLoops:
    vectorized: set[tuple[str, str, int]]
    prefetches: Counter[str]  # by function


def count_prefetches(assembly: str) -> Counter[str]:
    """How many instructions of each function ask for memory."""
    counts: Counter[str] = Counter()
    function = ""
    for line in assembly.splitlines():
        if label := re.match(r"(_Z\w+)[\w.]*:", line):  # of a part that GCC split off, too
            function = label.group(1)
        elif line.startswith("\tprefetch"):
            counts[function] += 1
    return Counter(dict(zip(demangled([*counts]), counts.values(), strict=True)))


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> CpuLoops:
    try:
        cxx = find_cxx()
    except Missing as missing:
        pytest.skip(str(missing))
    if "clang" in cxx.version:
        pytest.skip(f"the vectoriser's report is GCC's; this is {cxx.version}")
    if platform.machine() != "x86_64":
        pytest.skip(f"the AVX2 loops are x86-64's; this is {platform.machine()}")
    folder = tmp_path_factory.mktemp("cpu")
    dump, assembly = folder / "vect.txt", folder / "kernels.s"
    command = [*cxx.command, *CXX_FLAGS, *filter(cxx.accepts, CXX_OPTIONAL), "-Icsrc", "-S", "-o", str(assembly)]
    command += [f"-fdump-tree-vect-optimized-missed={dump}", "csrc/cpu/kernels_avx2.cpp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return CpuLoops(read_dump(dump.read_text()), count_prefetches(assembly.read_text()))


# Those that visit what is not in the caches yet.
@pytest.mark.parametrize(
    "function", ["widen_all", "separable_block", "advance_run", "advance_rows", "advance_points", "finish_block"]
)
def test_loops_ask_for_memory_ahead(loops: CpuLoops, function: str) -> None:
    compiled = {name for name, *_ in loops.vectorized if re.search(rf"\b{function}<", name)}
    assert compiled
    assert sorted(compiled - {*loops.prefetches}) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_instance_is_vectorised(loops: CpuLoops, function: str) -> None:
    file, *arguments = FUNCTIONS[function]
    lines = loop_lines(file, function)
    assert lines
    for line in lines:
        names = {name for name, f, n in loops.vectorized if (f, n) == (file, line)}
        done = {match.group(1) for name in names if (match := re.search(rf"\b{function}<(.*)>\(", name))}
        instances = (instance for instance in itertools.product(*arguments) if not is_missing(function, instance))
        wanted = {", ".join(instance) for instance in instances}
        assert sorted(wanted - done) == [], f"{file}:{line}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        compile_all(Path(folder))
        compiled = read_kernels(Path(folder))
    used: Counter[tuple[str, str, str, str]] = Counter()
    for k in compiled:  # two kernels for budgets go by one name
        key = (k.walker, k.rule, k.dtype, k.arch)
        used[key] = max(used[key], k.registers)
    archs = ", ".join(f"sm_{arch.replace('.', '')}" for arch in ARCHS)
    print(f"# Registers per thread that a kernel may use: walker, rule, dtype, {archs}")
    for key in KEYS:
        print(f"{key[0]:<10} {key[1]:<16} {key[2]:<7}", *(f"{used[(*key, arch)]:>3}" for arch in ARCHS))
