"""Checkpoints: a resumed run is the uninterrupted one bit for bit, and a dict that does not fit changes nothing."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import harness
import pytest
import registry
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch.nn import Parameter

import bregman_cuda
from bregman_cuda import (
    L1,
    AdaBreg,
    ElasticNet,
    GroupLasso,
    LinBreg,
    Nuclear,
    ProxSGD,
    SparseGroupLasso,
    SparseOptimizer,
)
from bregman_cuda.optim._rule import COUNTERS

SHAPES = [(6, 5), (4, 3, 3, 3), (7,)]
REGS = [lambda lam: None, L1, lambda lam: GroupLasso(lam, "out"), lambda lam: SparseGroupLasso(lam, 0.4, "out")]
TAKEN = [(rule, i) for rule in registry.EVERY_RULE for i in range(len(REGS)) if rule in registry.RULES or i in (0, 2)]
CASES = [(rule, d, i, masked) for rule, i in TAKEN for d in registry.DTYPES for masked in (False, True)]
PHASES = {"hspg": {"start": 2, "end": 4, "k": 2}}  # the first before the checkpoint, the second after it
N, MASK = 3, torch.arange(30).view(6, 5) % 3 > 0
CHANGED = [None, L1(0.2), ElasticNet(0.1, 0.5), GroupLasso(0.1, (0,)), SparseGroupLasso(0.2, 0.5, (-1,), "none")]
RATES = [0.0, 0.01, 0.3, torch.tensor(0.1)]
pytestmark = pytest.mark.usefixtures("cpu_kernels")


def model(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [registry.values(shape, dtype, generator, 0.3) for shape in shapes]
    return [Parameter(v.to(memory_format=torch.channels_last) if v.ndim == 4 else v) for v in values]


def train(optimizer: Any, params: Any, begin: int, end: int, missing: Any = None) -> None:
    """Steps begin to end - 1. Unless told what is missing, every third does without one gradient: counts differ."""
    for i in range(begin, end):
        generator = torch.Generator().manual_seed(i)
        gone = ({i % len(params)} if i % 3 == 1 else ()) if missing is None else missing
        for k, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.grad = None if k in gone else grad
        optimizer.step()


def everything(optimizer: Any, **options: Any) -> dict[str, Any]:
    """A copy of all that an optimizer has: parameters, state and options (some of them overwritten)."""
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group.update(options)
    return {"params": [p.detach().clone() for g in optimizer.param_groups for p in g["params"]], **saved}


def assert_same(a: Any, b: Any, where: str = "", tolerance: float = 0.0) -> None:
    """The same structure, types and bits."""
    assert type(a) is type(b), f"{where}: {a!r} and {b!r}"
    if isinstance(a, Tensor):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), where
        harness.compare(a, b, tolerance, where)
    elif isinstance(a, (dict, list, tuple)):
        a, b = (dict(x if isinstance(x, dict) else enumerate(x)) for x in (a, b))
        assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]", tolerance)
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def apart(optimizer: SparseOptimizer, dtype: torch.dtype) -> float:
    """What kernels and the reference may differ by after a step or three: fp64, by an ulp or two of torch's root and of
    a group's sum; where norms are searched, by what is summed in fp32."""
    return 1e-13 if dtype == torch.float64 else registry.apart(optimizer)


def a_reg(rule: str) -> Any:
    return GroupLasso(0.1) if rule in registry.GROUP_RULES else L1(0.1)


def saved_and_loaded(what: Any) -> Any:
    torch.save(what, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def copy_values(source: Any, target: Any) -> None:
    for p, q in zip(source, target, strict=True):
        q.data.copy_(p.data)


# Resuming in a new process


def make(case: Any, params: list[Parameter], fused: bool) -> Any:
    """As a script makes it: two groups, options of all types, nothing of what the user changes later."""
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.125), "maximize": True}]
    options = dict(fused=fused, count_nonzeros=True, **PHASES.get(case[0], {}))
    return registry.EVERY_RULE[case[0]].make(groups, REGS[case[2]](0.05), **options)


def run_script(*arguments: Any) -> subprocess.Popen[bytes]:
    """This file in a new process, with the package that is tested here."""
    path = os.pathsep.join([str(Path(bregman_cuda.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env={**os.environ, "PYTHONPATH": path})


def test_a_run_resumed_in_a_new_process_is_the_uninterrupted_one(tmp_path):
    """All cases, from kernels and from the reference; the user changes masks, strengths and step sizes meanwhile."""
    runs = []
    for fused, case in itertools.product((True, False), CASES):
        optimizer = make(case, params := model(case[1]), fused)
        for i in range(N):
            if case[3] and i < 2:
                optimizer.set_mask(params[i], torch.arange(params[i].numel()).view_as(params[i]) % 3 > i)
            train(optimizer, params, i, i + 1)
            optimizer.param_groups[0]["lr"] *= 0.75
            optimizer.param_groups[1]["lr"].fill_(0.25)
            if optimizer.param_groups[0]["reg"] is not None:
                optimizer.param_groups[0]["reg"].lam *= 0.75  # both groups hold it
        half = everything(optimizer)
        train(optimizer, params, N, 2 * N)
        runs.append([case, half, everything(optimizer)])
    torch.save(runs, tmp_path / "runs.pt")
    assert run_script("resume", tmp_path).wait(120) == 0, "its stderr says what differs"


def resume_all(folder: Path) -> None:
    """In the new process: every checkpoint is taken up by kernels and by the reference, and ends as it should."""
    runs = torch.load(folder / "runs.pt", weights_only=True)
    for (case, half, whole), fused in itertools.product(runs, (None, False)):
        optimizer = make(case, params := model(case[1]), fused)
        copy_values(half["params"], params)
        optimizer.load_state_dict(half)
        assert_same(everything(optimizer), half, f"{case}, loaded")
        for group, end in zip(optimizer.param_groups, whole["param_groups"]):
            other, group["fused"], end["fused"] = group["fused"] != (fused is None), fused, fused
        train(optimizer, params, N, 2 * N)
        assert_same(everything(optimizer), whole, f"{case}", 2 * apart(optimizer, case[1]) if other else 0.0)


def test_groups_that_share_a_regularizer_here_but_not_in_the_checkpoint():
    held, a, b = L1(0.5), model(), model()
    saved = LinBreg([{"params": a[:1], "reg": L1(0.1)}, {"params": a[1:], "reg": L1(0.2)}]).state_dict()
    optimizer = LinBreg([{"params": b[:1]}, {"params": b[1:]}], reg=held)
    optimizer.load_state_dict(saved)
    assert [group["reg"].lam for group in optimizer.param_groups] == [0.1, 0.2]
    assert optimizer.param_groups[0]["reg"] is held


def test_a_held_regularizer_from_before_it_had_a_field_takes_it():
    """One that was pickled by an earlier version has the class's default in its place."""
    held = Nuclear(0.1)
    del vars(held)["every"]
    optimizer = ProxSGD(model(shapes=[(6, 5)]), reg=held)
    optimizer.load_state_dict(ProxSGD(model(shapes=[(6, 5)]), reg=Nuclear(0.2, every=3)).state_dict())
    assert optimizer.param_groups[0]["reg"] is held
    assert held == Nuclear(0.2, every=3)


def test_hooks_see_and_may_change_what_is_loaded():
    optimizer, seen = AdaBreg(params := model(torch.bfloat16), reg=L1(0.1)), []
    train(optimizer, params, 0, 2)
    other = copy.deepcopy(optimizer.state_dict())
    other["state"][0]["dual"] += 1.0
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: other)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["dual"].clone()))
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same([optimizer.state[params[0]]["dual"], *seen], [other["state"][0]["dual"]] * 2)


# Dicts that do not fit


def of(name: str, shapes: Any = SHAPES, groups: int = 2, edit: tuple[Any, ...] = (), to: Any = None) -> dict[str, Any]:
    """The dict of an optimizer (torch's: Adam, SGD) after four steps, with one entry replaced or removed."""
    parts = [{"params": (params := model(shapes=shapes))[:2]}, {"params": params[2:]}][:groups]
    if name in registry.RULES:
        optimizer: Any = registry.RULES[name].make(parts, L1(0.3))
    else:
        optimizer = getattr(torch.optim, name)(parts, lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
    train(optimizer, params, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    if edit:
        holder: Any = functools.reduce(lambda d, key: d[key], edit[:-1], saved)
        holder.pop(edit[-1]) if to is None else holder.update({edit[-1]: to})
    return saved


GROUP, STATE = ("param_groups", 1), ("state", 1)
BAD = {  # name: (the optimizer that loads, what, what the error names)
    "transposed": ("adabreg", ["adabreg", [(5, 6), *SHAPES[1:]]], r"(?=.*\(6, 5\))(?=.*\(5, 6\))"),
    "parameter more": ("linbreg", ["linbreg", [*SHAPES, (2,)]], "group.*size"),
    "group less": ("linbreg", ["linbreg", SHAPES, 1], "number of parameter groups"),
    "AdaBreg's": ("linbreg", ["adabreg"], "betas|eps|exp_avg"),
    "ProxSGD's": ("linbreg_paper", ["proxsgd_momentum"], "delta|dual"),
    "Adam's": ("adabreg", ["Adam"], "weight_decay|amsgrad|reg"),
    "SGD's": ("proxsgd_momentum", ["SGD"], "weight_decay|nesterov|reg"),
    "no state": ("linbreg", ["linbreg", SHAPES, 2, ("state",)], "state"),
    "no lr": ("linbreg", ["linbreg", SHAPES, 2, (*GROUP, "lr")], "lr"),
    "no alpha": ("rmda", ["rmda", SHAPES, 2, (*STATE, "alpha")], "alpha"),
    "negative alpha": ("rmda", ["rmda", SHAPES, 2, (*STATE, "alpha"), -1.0], "alpha must be.*-1"),
    "RAMDA's": ("rmda", ["ramda"], "eps"),
    "AMSGrad's": ("proxsgd", ["proxadam_amsgrad"], "amsgrad|betas"),
    "no step": ("linbreg", ["linbreg", SHAPES, 2, (*STATE, "step")], "step"),
    "steps": ("adabreg", ["adabreg", SHAPES, 2, (*STATE, "step"), torch.zeros(3)], "step must be a number"),
    "negative step": ("adabreg", ["adabreg", SHAPES, 2, (*STATE, "step"), -1.0], "step must be.*-1"),
    "no dual": ("linbreg", ["linbreg", SHAPES, 2, (*STATE, "dual")], "dual"),
    "short mask": ("linbreg", ["linbreg", SHAPES, 2, (*STATE, "mask"), torch.ones(8).byte()], r"mask.*8\b"),
    "float mask": ("linbreg", ["linbreg", SHAPES, 2, (*STATE, "mask"), torch.ones(4, 3, 3, 3)], "mask.*bool"),
    "lost mask": ("linbreg", ["linbreg", SHAPES, 2, (*GROUP, "masks"), 1], "saved with masks on 1.*and has 0"),
    "broadcast dual": ("adabreg", ["adabreg", SHAPES, 2, (*STATE, "dual"), torch.ones(3)], r"dual.*\(3,\)"),
    "unknown option": ("linbreg", ["linbreg", SHAPES, 2, (*GROUP, "weight_decay"), 0.1], "weight_decay"),
    "negative lr": ("linbreg", ["linbreg", SHAPES, 2, (*GROUP, "lr"), -1.0], "lr.*-1"),
    "unknown reg": ("linbreg", ["linbreg", SHAPES, 2, (*GROUP, "reg"), {"regularizer": "L7"}], "unknown.*'L7'"),
    "abstract reg": ("linbreg", ["linbreg", SHAPES, 2, (*GROUP, "reg"), {"regularizer": "Grouped"}], "Grouped"),
    "reg of matrices": ("linbreg", ["linbreg", SHAPES, 2, (*GROUP, "reg"), GroupLasso(1, "in").to_dict()], r"\(7,\)"),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_a_dict_that_does_not_fit_is_refused_and_changes_nothing(bad, fused):
    name, what, message = BAD[bad]
    held, ends = [L1(0.1), GroupLasso(0.2)], []
    for meet in (False, True):
        params = model()
        groups = [{"params": params[:2], "reg": held[0]}, {"params": params[2:], "reg": held[1]}]
        optimizer = registry.RULES[name].make(groups, None, fused=fused, count_nonzeros=True)
        optimizer.set_mask(params[0], MASK)
        train(optimizer, params, 0, 3)
        if meet:
            handed, given, before = of(*what), of(*what), everything(optimizer)
            with pytest.raises((ValueError, KeyError, TypeError)) as refused:
                optimizer.load_state_dict(handed)
            assert re.search(message, str(refused.value), re.DOTALL), f"{refused.value} does not say what differs"
            assert_same([everything(optimizer), handed], [before, given])
            assert all(group["reg"] is reg for group, reg in zip(optimizer.param_groups, held))
        train(optimizer, params, 3, 6)
        ends.append(everything(optimizer))
    assert_same(*ends)


@pytest.mark.parametrize("name", registry.EVERY_RULE)
def test_dicts_of_older_versions_and_with_what_schedulers_add_are_taken(name):
    params, twins = model(), model()
    optimizer, other = (registry.EVERY_RULE[name].make(p, a_reg(name)) for p in (params, twins))
    optimizer.set_mask(params[0], MASK)
    other.load_state_dict(optimizer.state_dict())  # a mask is all the state there is
    train(optimizer, params, 0, 3)
    old, flags = saved_and_loaded(optimizer.state_dict()), ("maximize", "fused", "count_nonzeros", "check_finite")
    for flag in flags:
        del old["param_groups"][0][flag]
    old["param_groups"][0] |= {"initial_lr": 0.5, "max_lr": 1.0}  # OneCycleLR's
    other.load_state_dict(old)
    assert [other.param_groups[0][key] for key in (*flags, "initial_lr")] == [False, None, False, False, 0.5]
    copy_values(params, twins)
    train(optimizer, params, 3, 6)
    train(other, twins, 3, 6)
    assert_same(everything(other)["state"], everything(optimizer)["state"])


# A crash


def train_with_checkpoints(folder: Path, steps: int) -> None:
    """What a careful script does: takes up the last checkpoint, and replaces it in one go."""
    optimizer = AdaBreg(params := model(torch.bfloat16), lr=0.01, reg=SparseGroupLasso(0.05))
    optimizer.set_mask(params[0], MASK)
    saved: dict[str, Any] = {"next": 0}
    if (folder / "checkpoint.pt").exists():
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        optimizer.load_state_dict(saved)
        copy_values(saved["params"], params)
    for i in range(saved["next"], steps):
        train(optimizer, params, i, i + 1)
        if i % 5 == 4 or i == steps - 1:
            torch.save({"next": i + 1, **everything(optimizer)}, folder / "new.pt")
            os.replace(folder / "new.pt", folder / "checkpoint.pt")


def test_a_run_killed_in_the_middle_of_its_steps_ends_as_if_it_had_not_been(tmp_path):
    file, last = tmp_path / "checkpoint.pt", 0
    for delay in (0.05, 0.0123):
        process, begun, limit = run_script("train", tmp_path, 10**9), time.time_ns(), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            if file.exists() and file.stat().st_mtime_ns > begun:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        before, last = last, torch.load(file, weights_only=True)["next"]
        assert last > before
    assert run_script("train", tmp_path, last + 7).wait(60) == 0
    (tmp_path / "straight").mkdir()
    train_with_checkpoints(tmp_path / "straight", last + 7)
    assert_same(*(torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path, tmp_path / "straight")))


# Kernels and reference in lockstep


class Lockstep(RuleBasedStateMachine):
    """Whatever a user does between steps, in any order: both drivers do the same, and masked entries stay zero."""

    @initialize(name=st.sampled_from(sorted(registry.EVERY_RULE)), dtype=st.sampled_from(registry.DTYPES))
    def begin(self, name, dtype):
        self.make, self.seed, self.masks = registry.EVERY_RULE[name].make, 0, {}
        self.only_groups = name in registry.GROUP_RULES
        self.models = [torch.nn.ParameterList(model(dtype)) for _ in range(2)]
        self.sides = [self.make(list(m), a_reg(name), fused=f) for m, f in zip(self.models, (None, False))]

    @rule(missing=st.sets(st.integers(0, 4), max_size=2))
    def step(self, missing):
        self.seed += 1
        for module, side in zip(self.models, self.sides):
            train(side, module, self.seed, self.seed + 1, missing)

    @rule(cross=st.booleans())
    def resume(self, cross):
        """Fresh optimizers load the checkpoints, each driver its own or the other's."""
        saved = [saved_and_loaded(everything(side)) for side in self.sides]
        for k, fused in enumerate((None, False)):
            mine, module = saved[k ^ cross], self.models[k]
            copy_values(mine["params"], module)
            parts = [{"params": [module[i] for i in group["params"]]} for group in mine["param_groups"]]
            self.sides[k] = self.make(parts, GroupLasso(9.0), fused=fused)
            self.sides[k].load_state_dict(mine)
            for group in self.sides[k].param_groups:
                group["fused"] = fused

    @precondition(lambda self: len(self.models[0]) < 5)
    @rule(reg=st.sampled_from(CHANGED), shape=st.sampled_from([(5,), (3, 1, 2), (0, 3), (70,)]))
    def add_group(self, reg, shape):
        reg = self.taken(reg)
        for module, side in zip(self.models, self.sides):
            module.extend(model(module[0].dtype, [shape]))
            side.add_param_group({"params": [module[-1]], "reg": copy.copy(reg), "maximize": True})

    @rule(which=st.integers(0, 9), change=st.sampled_from([*CHANGED, 0.0, 0.03, 0.5]), lr=st.sampled_from(RATES))
    def change_options(self, which, change, lr):
        for side in self.sides:
            group = side.param_groups[which % len(side.param_groups)]
            group["lr"] = copy.copy(lr)
            if not isinstance(change, float):
                group["reg"] = copy.copy(self.taken(change))
            elif group["reg"] is not None:
                group["reg"].lam = change

    def taken(self, reg):
        return GroupLasso(0.1, (0,)) if self.only_groups and reg and reg.elementwise else reg

    @rule(which=st.integers(0, 9), share=st.sampled_from([0.0, 0.5, 1.0, None]))
    def change_mask(self, which, share):
        i = which % len(self.models[0])
        kept = torch.rand(self.models[0][i].shape, generator=torch.Generator().manual_seed(which)) < (share or 0.0)
        self.masks[i] = None if share is None else kept
        for module, side in zip(self.models, self.sides):
            side.set_mask(module[i], self.masks[i])

    @rule(dtype=st.sampled_from(registry.DTYPES))
    def change_dtype(self, dtype):
        for module in self.models:
            module.to(dtype)

    @invariant()
    def both_sides_agree(self):
        tolerance = apart(self.sides[0], self.models[0][0].dtype)
        assert_same(*(everything(side, fused=None) for side in self.sides), tolerance=tolerance)
        for i, (p, q) in enumerate(zip(*self.models)):
            state = self.sides[0].state.get(p, {})
            if self.masks.get(i) is not None:
                tensors = [p.detach(), *(v for k, v in state.items() if k not in (*COUNTERS, "mask"))]
                assert not any(bool(t[~self.masks[i]].any()) for t in tensors), f"parameter {i} left its mask"
            if tolerance:  # an ulp apart: together again, so that it neither adds up nor is rounded apart
                q.data.copy_(p.data)
                [v.copy_(state[k]) for k, v in self.sides[1].state.get(q, {}).items()]


Lockstep.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestLockstep = Lockstep.TestCase


# Large counts, and threads


@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_counted_beyond_what_float32_can_count(fused):
    optimizer = AdaBreg(params := model(), fused=fused)
    train(optimizer, params, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"].fill_(2**24)
    optimizer.load_state_dict(saved)
    for i in range(4):
        train(optimizer, params, i, i + 1, missing=())
        assert [int(optimizer.state[p]["step"]) for p in params] == [2**24 + i + 1] * 3
        optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))


def test_threads_with_an_optimizer_each_compute_what_one_does():
    def work(name: str, fused: bool, results: dict[str, Any], gate: threading.Barrier) -> None:
        params = model(shapes=[(64, 300), (4, 3, 3, 3), (20_000,)])
        optimizer = registry.RULES[name].make(params, reg, fused=fused)
        gate.wait(60)
        train(optimizer, params, 0, 40)
        results[name] = everything(optimizer)

    reg, alone, together = L1(0.05), {}, {}
    jobs = [("adabreg", True), ("linbreg_paper", True), ("proxsgd", False)]
    for job in jobs:
        work(*job, alone, threading.Barrier(1))
    gate = threading.Barrier(len(jobs))
    threads = [threading.Thread(target=work, args=(*job, together, gate)) for job in jobs]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert_same({name: together[name] for name in alone}, alone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = {"resume": resume_all, "train": train_with_checkpoints}[sys.argv[1]]
    work(Path(sys.argv[2]), *map(int, sys.argv[3:]))
