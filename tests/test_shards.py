"""Sharded training with real gloo processes: FSDP2 and tensor parallelism give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import placed
import pytest
import sharded as here
import torch
from harness import same_bits
from test_ecosystem import network

import bregman_cuda
from bregman_cuda import L1, AdaBreg, GroupLasso

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run_ranks(role: str, world: int, folder: Path, *sources: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/sharded.py"), role]
    tail = [str(world), str(folder), *map(str, sources)]
    logs = [open(folder / f"{role}{rank}.log", "w+") for rank in range(world)]  # noqa: SIM115
    ranks = [
        subprocess.Popen([*command, str(rank), *tail], env=environment, stderr=log) for rank, log in enumerate(logs)
    ]
    try:
        for rank, log in zip(ranks, logs):
            code = rank.wait(timeout=480)
            log.seek(0)
            assert code == 0, f"{code}: {log.read()[-4000:]}"
    finally:
        for rank, log in zip(ranks, logs):
            rank.kill()
            rank.wait()
            log.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results and checkpoints of a number of ranks."""
    done = {}

    def results(world: int):
        if world not in done:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            done[world] = folder, None
            run_ranks("worker", world, folder)
            done[world] = folder, torch.load(folder / "results.pt", weights_only=False)
        assert done[world][1] is not None, "the ranks failed, see the first test that asked for them"
        return done[world]

    return results


@pytest.fixture(params=[2, 4])
def world(request):
    return request.param


def assert_close(ours, expected) -> None:
    """Within what another order of summing gradients does; the zeros are the same."""
    for key in ("params", "points"):
        for a, b in zip(ours[key], expected[key], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert torch.equal(a == 0, b == 0)
    assert ours["state"].keys() == expected["state"].keys()
    for key, value in ours["state"].items():
        torch.testing.assert_close(value, expected["state"][key], rtol=1e-4, atol=1e-5)
    for a, b in zip(ours["masks"], expected["masks"], strict=True):
        assert a is b is None or torch.equal(a, b)
    assert ours["density"] == expected["density"]


TENSORS = [(n, *case) for n in (2, 4) for case in placed.tensor_cases(n)]


@pytest.mark.parametrize(("n", "rule", "layout", "dtype"), TENSORS, ids=lambda v: str(v).removeprefix("torch."))
def test_every_rule_and_regularizer_steps_as_on_one_process(ranks, n, rule, layout, dtype):
    """Bit for bit, given the same gradients, masks included: sums of squares run in float64, where only fp64
    parameters see the order of a sum. Penalties of the whole tensor, and norms that are searched, have kernels that
    round otherwise. None of the collectives where no group is cut."""
    ours, expected = ranks(n)[1][rule, layout, dtype], placed.tensors(rule, layout, dtype, None)
    assert ours["collectives"] == placed.collectives_of(rule, layout)
    assert ours["counts"] == expected["counts"]
    assert any(bool((p == 0).any()) for p in expected["params"])
    for a, b, s, t, exact in zip(*(found[k] for k in ("params", "state") for found in (ours, expected)), ours["exact"]):
        for x, y in [(a, b), *((s[k], t[k]) for k in t)]:
            if exact and dtype != torch.float64:
                assert same_bits(x, y)
            else:
                rounding = torch.finfo(x.dtype).eps * (64 if x.dtype.itemsize > 2 else 2)
                torch.testing.assert_close(x, y, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", here.CASES)
def test_fsdp_trains_as_one_process(ranks, world, name):
    """Uneven and empty shards included: 17 and 3 rows on 2 and 4 ranks."""
    assert_close(ranks(world)[1][name], here.outcome(*here.single(name)))


@pytest.mark.parametrize("name", here.CASES)
def test_state_dict_functions_bring_sharded_state_along(ranks, world, name):
    """Sharded, full, and full from the first rank."""
    assert ranks(world)[1][name]["handed on"] == [True] * 3


@pytest.mark.parametrize("name", here.CASES)
def test_checkpoint_of_many_ranks_continues_on_one(ranks, world, name):
    found = here.resume(name, network(), str(ranks(world)[0] / name), slice(None), no_dist=True)
    assert_close(found, here.outcome(*here.single(name)))


@pytest.fixture(scope="module")
def resumed(ranks, tmp_path_factory):
    """Two ranks continue from the checkpoints of four, and of one without shards; and the folder of what they save."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    alone = tmp_path_factory.mktemp("alone")
    for name in here.CASES:
        weights, state = get_state_dict(*here.single(name, end=3))
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(alone / name), no_dist=True)
    run_ranks("resumer", 2, alone, ranks(4)[0], alone)
    return alone, torch.load(alone / "resumed.pt", weights_only=False)


@pytest.mark.parametrize("source", [0, 1], ids=["from 4 ranks", "from one process"])
@pytest.mark.parametrize("name", here.CASES)
def test_checkpoint_continues_on_two_ranks(resumed, name, source):
    """Masks included; without a mask to load into they would be lost, and that is an error."""
    found = resumed[1][source, name]
    assert_close(found, here.outcome(*here.single(name)))
    assert ("saved with masks on 1 of its parameters, and has 0" in found["lost"]) == here.CASES[name][2]


@pytest.mark.parametrize("name", here.CASES)
def test_checkpoint_goes_from_four_ranks_over_two_to_one(resumed, name):
    found = here.resume(name, network(), str(resumed[0] / "chain" / name), slice(None), begin=4, no_dist=True)
    assert_close(found, here.outcome(*here.single(name)))


@pytest.mark.parametrize("groups", ["l1", "in", "out"])
def test_tensor_parallel_layers_train_as_whole_ones(ranks, world, groups):
    reg = L1(0.05) if groups == "l1" else GroupLasso(0.05, groups)
    model = network(16)
    optimizer = AdaBreg(bregman_cuda.param_groups(model, weights=reg), lr=1e-2)
    here.train(model, optimizer, slice(None))
    for ours, expected in zip(ranks(world)[1]["tensor parallel", groups], model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours == 0, expected == 0)


def test_grad_scaler_and_clipping(ranks, world):
    """An overflow on one rank skips the step on all of them; norms of gradients are those of whole tensors."""
    ours, expected = ranks(world)[1]["scaled"], here.scaled(network(), slice(None), True)
    assert ours["log"] == pytest.approx(expected["log"], rel=1e-4)
    assert ours["steps"] == expected["steps"] == 4
    assert_close(ours, expected)


def test_ranks_skip_a_step_together(ranks, world):
    assert ranks(world)[1]["agreed"] == world


@pytest.mark.parametrize("name", placed.ENDS)
def test_hspg_ends_with_k_groups_of_each_tensor_or_of_all(ranks, world, name):
    """Kernels round the prox of an envelope otherwise."""
    expected = placed.ended(name, None)
    for ours, alone in zip(ranks(world)[1]["ended"][name], expected, strict=True):
        if name == "each":
            assert same_bits(ours, alone)
        assert torch.equal(ours == 0, alone == 0)
        torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-6)
    left = [int((GroupLasso(1.0, "in").group_norms(p) > 0).sum()) for p in expected]
    assert left[:4] == [2, 1, 2, 2] if name == "each" else sum(left[:4]) == 6
    assert sum(left[4:]) == 3


@pytest.mark.parametrize("name", placed.RIGL)
def test_rigl_moves_the_masks_of_whole_tensors(ranks, world, name):
    ours, expected = ranks(world)[1]["rigl"][name], placed.rigl(placed.RIGL[name], None)
    for key in ("params", "masks", "packed"):
        assert all(map(same_bits, ours[key], expected[key])), key
    assert sum(int(mask.sum()) for mask in ours["masks"]) == round(0.4 * sum(m.numel() for m in ours["masks"]))


@pytest.mark.parametrize("name", placed.CHANGES)
def test_options_that_change_between_steps(ranks, world, name):
    torch.testing.assert_close(ranks(world)[1]["changing"][name], placed.changing(name, None), rtol=1e-5, atol=1e-6)


def test_a_module_that_is_made_float64_between_steps(ranks, world):
    torch.testing.assert_close(ranks(world)[1]["turned wide"], placed.turned_wide(None), rtol=1e-12, atol=1e-13)


def test_parameters_of_other_ranks_are_left_alone(ranks, world):
    assert ranks(world)[1]["elsewhere"] == 12


def test_what_shards_cannot_do_is_refused(ranks, world):
    refused = ranks(world)[1]["refused"]
    assert "ProxAdam: parameter 0 of shape (6, 4): its prox sums over the ranks that hold it" in refused["capturable"]
    assert "its ranks hold summands (a Partial placement)" in refused["partial"]
    assert (
        "fused=True, but parameter 0 of shape (6, 4) cannot use kernels: its shards cut groups, or" in refused["fused"]
    )
    assert "the mask is sharded as (Replicate(),), the parameter as (Shard(dim=0),)" in refused["mask"]
    assert "the parameter as a whole" in refused["mask of a plain one"]
    assert "has a gradient on some of them only" in refused["some gradients"]
    name = "ValueError: LinBreg: the state dict's state of parameter 0 of shape (6, 4): dual is sharded as "
    now, other = (f"(Shard(dim=0),) on ranks {[*range(n)]}" for n in (world, world // 2))
    for case, there in (("whole", "a whole"), ("other world", other)):
        tail = f"{there}, the parameter as {now}; load through torch.distributed.checkpoint"
        assert refused[case] == name + tail


@pytest.mark.parametrize("groups", here.COMPILED)
def test_compiled_steps_of_sharded_parameters(ranks, groups):
    expected = here.compiled(here.COMPILED[groups], None)
    for ours, whole in zip(ranks(2)[1]["compiled"][groups], expected, strict=True):
        assert same_bits(ours, whole)
