"""Build the kernels: two plain shared libraries that `torch.ops.load_library` loads.

They use LibTorch's stable ABI and no Python C API, so one build serves every torch >= 2.10 and every
Python.  CPU kernels need a C++ compiler; CUDA kernels also nvcc of the CUDA major that torch was
built with.  What cannot be built is left out with a one-line reason, unless BREGMAN_CUDA_REQUIRE
asks for it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from compiling import Job, cancel, max_jobs, run, wait_for
from find_torch import Torch, find_torch
from toolchain import Cxx, Missing, Nvcc, find_cxx, find_nvcc, gencode_flags, parse_archs, skip_requested, visible_archs

CPU_SOURCES = ("csrc/cpu/*.cpp",)
CPU_BINDING = ("csrc/torch/cpu_ops.cpp",)
CUDA_SOURCES = ("csrc/cuda/*.cu",)
CUDA_BINDING = ("csrc/torch/cuda_ops.cpp",)
OUTPUTS = ("_C_cpu.so", "_C_cuda.so", "_build.json")
NEEDS_CPU = "they need the CPU module, which was not built"

TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # runs on torch >= 2.10
# No contraction and no fast-math: the kernels equal the reference bit for bit.  Dropping the IEEE
# exception flags changes no value, and GCC vectorises comparisons only then.
CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-Wall", "-fvisibility=hidden")
CXX_OPTIONAL = ("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
NVCC_FLAGS = (
    "-O3", "-std=c++20", "-fmad=false", "-lineinfo", "-Xfatbin=-compress-all",
    "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-Wall,-fvisibility=hidden",
)  # fmt: skip


@dataclass
class Report:
    """What was built; the content of `bregman_cuda/_build.json`."""

    version: str
    torch: str | None = None
    cpu: bool = False
    cuda: bool = False
    cuda_archs: tuple[str, ...] = ()
    nvcc: str | None = None
    cxx: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Part:
    """One library: what to compile, how to link it, and what to say once it is there."""

    name: str
    jobs: list[Job]
    linker: list[str]
    libraries: list[str]
    success: str
    cuda_archs: tuple[str, ...] = ()


class NativeBuild:
    """One build: `root` holds csrc, `out` receives the libraries, `temp` the objects."""

    def __init__(self, root: Path, out: Path, temp: Path, version: str, env: Mapping[str, str] = os.environ) -> None:
        self.root, self.out, self.temp, self.env = root, out, temp, env
        self.report = Report(version)
        self.workers = 1

    def run(self) -> Report:
        """Build what can be built and write the report; Missing where a required part cannot be."""
        required = self.env.get("BREGMAN_CUDA_REQUIRE", "")
        if required not in ("", "cpu", "cuda"):
            raise Missing(f"BREGMAN_CUDA_REQUIRE={required!r} is neither cpu nor cuda")
        self.out.mkdir(parents=True, exist_ok=True)
        for name in OUTPUTS:  # an earlier build, with other tools, may have left some
            (self.out / name).unlink(missing_ok=True)
        parts = [self._attempt("cpu", self._plan_cpu), self._attempt("cuda", self._plan_cuda)]
        self._check(required)
        self._build([part for part in parts if part])
        self.report.write(self.out / "_build.json")
        self._check(required)
        return self.report

    def _check(self, required: str) -> None:
        """Missing if a required part is known not to be there; CUDA cannot do without the CPU part."""
        for name in {"": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}[required]:
            if name in self.report.reasons:
                reason = self.report.reasons[name]
                raise Missing(f"BREGMAN_CUDA_REQUIRE={required}, but no {name} kernels: {reason}")

    def _attempt(self, name: str, work: Callable[[], Part]) -> Part | None:
        """Do some work on a part; why it cannot be done goes into the report and, as a line, to the log."""
        try:
            return work()
        except Missing as missing:
            self.report.reasons[name] = str(missing)
            print(f"bregman_cuda: no {name.upper()} kernels: {missing}", flush=True)
            return None

    def _build(self, parts: list[Part]) -> None:
        """Compile all parts in one pool, then link each."""
        with ThreadPoolExecutor(self.workers) as pool:
            # The last part is CUDA, whose files take longest: they go first.
            running = {part.name: [pool.submit(job.run, self.root) for job in part.jobs] for part in reversed(parts)}
            for part in parts:
                self._attempt(part.name, partial(self._finish, part, running[part.name]))

    def _finish(self, part: Part, running: list[Future[None]]) -> Part:
        if part.name == "cuda" and "cpu" in self.report.reasons:
            cancel(running)
            raise Missing(NEEDS_CPU)
        wait_for(running)
        objects = [str(job.object) for job in part.jobs]
        library = self.out / f"_C_{part.name}.so"
        unfinished = self.temp / library.name  # a link that is broken off leaves no half library in the package
        command = [*part.linker, *objects, *part.libraries, "-o", str(unfinished.resolve())]
        run(command, self.root, f"linking {library.name}")
        shutil.move(unfinished, library)
        setattr(self.report, part.name, True)
        self.report.cuda_archs += part.cuda_archs
        print(f"bregman_cuda: built the {part.name.upper()} kernels {part.success}", flush=True)
        return part

    def _plan_cpu(self) -> Part:
        torch, cxx = self._torch(), find_cxx(self.env)
        self.workers = max_jobs(self.env)
        self.report.torch, self.report.cxx = torch.version, cxx.version
        command = self._cxx_command(cxx)
        jobs = [*self._jobs(CPU_SOURCES, command), *self._jobs(CPU_BINDING, [*command, *self._torch_flags(cxx, torch)])]
        libraries = [f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
        if sys.platform == "linux":  # a symbol that torch lacks shows now, not at import
            libraries = ["-Wl,--as-needed", *libraries, "-Wl,--no-undefined"]
        linker = [*cxx.command, "-shared", *self.env.get("LDFLAGS", "").split()]
        return Part("cpu", jobs, linker, libraries, f"with {cxx.version} against {torch}")

    def _plan_cuda(self) -> Part:
        if "cpu" in self.report.reasons:
            raise Missing(NEEDS_CPU)
        torch = self._torch()
        if torch.cuda is None:
            raise Missing(f"{torch} is not a CUDA build of torch")
        nvcc, cxx = find_nvcc(self.env), find_cxx(self.env)
        if nvcc.release.partition(".")[0] != torch.cuda.partition(".")[0]:
            raise Missing(f"nvcc is of CUDA {nvcc.release}, torch {torch.version} of {torch.cuda}")
        archs = parse_archs(self.env.get("TORCH_CUDA_ARCH_LIST") or visible_archs(nvcc, self.env), nvcc)
        self.report.nvcc = nvcc.release
        include = [f"-isystem{nvcc.include}"] if nvcc.include else []
        jobs = self._jobs(CUDA_SOURCES, self._nvcc_command(nvcc, cxx, archs))
        binding = [*self._cxx_command(cxx), *self._torch_flags(cxx, torch), "-DUSE_CUDA", *include]
        jobs += self._jobs(CUDA_BINDING, binding)
        # aoti_torch_get_current_cuda_stream is libtorch_cuda's, which libtorch brings along.
        libraries = [f"-L{torch.folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch"]
        libraries += ["-Xlinker=--as-needed", "-ltorch_cpu", "-ltorch_cuda", "-Xlinker=--no-undefined"]
        success = f"for {';'.join(archs)} with nvcc {nvcc.release} against {torch}"
        # No code is relocatable: a device link would only add an empty module.
        linker = [nvcc.path, "-shared", "-cudart=static", "--no-device-link"]
        return Part("cuda", jobs, linker, libraries, success, tuple(archs))

    def _torch(self) -> Torch:
        if skip_requested(self.env):
            raise Missing("BREGMAN_CUDA_SKIP_EXT is set")
        if sys.platform not in ("linux", "darwin"):
            raise Missing(f"kernels are built on Linux and macOS only, not on {sys.platform}")
        torch = find_torch()
        if torch is None:
            raise Missing("no torch to build against (install torch>=2.10, then reinstall)")
        if torch.problem:
            raise Missing(torch.problem)
        return torch

    def _cxx_command(self, cxx: Cxx) -> list[str]:
        users = self.env.get("CXXFLAGS", "").split()
        optional = [flag for flag in CXX_OPTIONAL if cxx.accepts(flag)]
        return [*cxx.command, *users, *CXX_FLAGS, *optional, "-Icsrc"]

    def _nvcc_command(self, nvcc: Nvcc, cxx: Cxx, archs: list[str]) -> list[str]:
        # Architectures are taken at once, as one file takes most of the time (until the others are done, more run than
        # there are CPUs); spare CPUs share out its kernels.
        parallel = [f"--threads={min(self.workers, len(archs))}"]
        if float(nvcc.release) >= 12.1 and self.workers > len(archs):
            parallel.append(f"--split-compile={self.workers // len(archs)}")
        host = [f"-ccbin={cxx.command[0]}"] if self.env.get("CXX") else []
        return [nvcc.path, *NVCC_FLAGS, *gencode_flags(archs), *host, *parallel, "-Icsrc"]

    def _torch_flags(self, cxx: Cxx, torch: Torch) -> list[str]:
        # The version is part of the command so that an upgraded torch recompiles. Kernels know nothing of torch.
        built_on = f'-DBREGMAN_BUILT_ON_TORCH="{torch.version}"'
        hide = f"-ffile-prefix-map={torch.folder}=torch"  # no path of this machine in the library
        flags = [f"-isystem{torch.folder / 'include'}", TARGET_VERSION, built_on]
        return [hide, *flags] if cxx.accepts(hide) else flags

    def _sources(self, patterns: tuple[str, ...]) -> list[Path]:
        files = [file for pattern in patterns for file in sorted(self.root.glob(pattern))]
        if not files:
            raise Missing(f"no sources at {' '.join(patterns)}")
        return [file.relative_to(self.root) for file in files]

    def _jobs(self, patterns: tuple[str, ...], command: list[str]) -> list[Job]:
        objects = self.temp.resolve()
        return [Job(source, objects / f"{source}.o", tuple(command)) for source in self._sources(patterns)]
