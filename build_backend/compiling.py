"""Compile and link in parallel, redoing only what changed since the last build."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from toolchain import Missing


def max_jobs(env: Mapping[str, str] = os.environ) -> int:
    """`$MAX_JOBS`, or the number of CPUs that this process may use."""
    text = env.get("MAX_JOBS", "")
    if text:
        if not text.isdigit() or int(text) == 0:
            raise Missing(f"MAX_JOBS={text!r} is not a positive number")
        return int(text)
    if hasattr(os, "sched_getaffinity"):  # fewer than cpu_count() in a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """One source file, the object it becomes, and the command without either."""

    source: Path
    object: Path
    command: tuple[str, ...]

    @property
    def full_command(self) -> list[str]:
        depends = str(self.object.with_suffix(".d"))
        return [
            *self.command, "-MMD", "-MF", depends, "-c", str(self.source), "-o", str(self.object)
        ]  # fmt: skip

    def up_to_date(self, root: Path) -> bool:
        """Whether the object is newer than all it was made of, by the same command."""
        try:
            built = self.object.stat().st_mtime_ns
            same = json.loads(self._stamp.read_text()) == self.full_command
            rule = self.object.with_suffix(".d").read_text().replace("\\\n", " ")
            sources = shlex.split(rule.partition(":")[2])
            return same and all((root / file).stat().st_mtime_ns < built for file in sources)
        except (OSError, ValueError):
            return False

    def run(self, root: Path) -> None:
        """Compile; Missing with the compiler's first error if that fails."""
        if self.up_to_date(root):
            return
        self.object.parent.mkdir(parents=True, exist_ok=True)
        self._stamp.unlink(missing_ok=True)
        run(self.full_command, root, f"compiling {self.source}")
        self._stamp.write_text(json.dumps(self.full_command))

    @property
    def _stamp(self) -> Path:
        return self.object.with_suffix(".cmd")


def run(command: list[str], root: Path, what: str) -> None:
    """Run a compiler and show what it prints; Missing with its first error if it fails."""
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Missing(f"{what} failed: {error}") from error
    text = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        if text:
            print(text, flush=True)
        return
    print(shlex.join(command), text, sep="\n", flush=True)
    lines = [line.strip() for line in text.splitlines()] or [f"exit status {done.returncode}"]
    first = next((line for line in lines if "error" in line or "undefined" in line), lines[0])
    raise Missing(f"{what} failed: {first}")


def wait_for(futures: list[Future[None]]) -> None:
    """Wait for compilations; where one fails, those that have not begun are dropped."""
    try:
        for future in futures:
            future.result()
    except Missing:
        cancel(futures)
        raise


def cancel(futures: list[Future[None]]) -> None:
    """Drop the compilations that have not begun."""
    for future in futures:
        future.cancel()
