"""SplitLBI against what is known in closed form: entry times, paths, invariances, recovery; its precision and masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from harness import same_bits
from small import model, train
from split_net import quadratic

from bregman_cuda import L1, GroupLasso, SplitLBI

WIDE = torch.float64
# The orthogonal design X'X/n = I: the loss is |w - b|^2 / 2, whose gradient is w - b.
B = (3.1, -2.2, 1.45, -0.97, 0.53, 0.061, -0.047, 0.029)
GROUPS = ((2.0, -1.0, 0.5), (0.3, 0.9, -0.8), (0.05, -0.04, 0.03), (0.7, 0.1, -0.2))


def entry_steps(p, optimizer, step, groups: int, last: int) -> list[int]:
    """The number of the step at which each of the first rows of the twin became non-zero."""
    entered = torch.zeros(groups, dtype=torch.int64)
    for k in range(1, last + 1):
        step()
        alive = optimizer.support(p).view(p.shape[0], -1)[:groups].any(1)
        entered[alive & (entered == 0)] = k
    return entered.tolist()


@pytest.mark.parametrize(
    ("lr", "kappa", "mu", "true", "noise"),
    [
        (0.1, 1.0, 20.0, [78, 105, 155, 227, 406], [3453, 4478, 7251]),
        (0.1, 1.0, 100.0, [336, 469, 707, 1052, 1916], [16568, 21500, 34838]),
        (0.01, 1.0, 10.0, [446, 591, 850, 1225, 2167], [18124, 23496, 38022]),
        (0.05, 10.0, 10.0, [73, 102, 154, 229, 417], [3609, 4683, 7589]),
    ],
)
def test_coordinates_enter_when_the_formula_says(driver, lr, kappa, mu, true, noise):
    """In the order of |b|, at the first k with (lr/mu) W [k - (1 - r^k) / (kappa lr s)] beyond lam."""
    p, optimizer, step = quadratic(B, driver, L1(1.0), lr=lr, kappa=kappa, mu=mu)
    s = 1 + 1 / mu
    r = 1 - kappa * lr * s
    k = np.arange(1, noise[-1] + 2, dtype=float)
    pace = lr / mu * (k - (1 - r**k) / (kappa * lr * s)) / s
    assert [int(np.argmax(pace * abs(b) > 1)) + 1 for b in B] == [*true, *noise]
    if driver.name == "emulated":  # a thread per CUDA thread: the true coordinates are enough
        assert entry_steps(p, optimizer, step, 5, true[-1] + 1) == true
    elif noise[-1] < 10000 or driver.name == "cpu":
        assert entry_steps(p, optimizer, step, 8, noise[-1] + 1) == [*true, *noise]
    else:
        assert entry_steps(p, optimizer, step, 6, noise[0] + 1) == [*true, noise[0]]


def test_the_path_of_one_coordinate(driver):
    p, optimizer, step = quadratic([3.1], driver, L1(1.0), lr=0.1, mu=20.0)
    known = {
        50: (2.9408643556, 0.5980540783, 0.0),
        78: (2.9518652856, 1.0108635578, 0.0108635578),
        100: (2.9617778698, 1.3183551676, 0.3183551676),
        1000: (3.0980905452, 4.0617156677, 3.0617156677),
    }
    matrix = np.array([[1 + 1 / 20, -1 / 20], [-1 / 20, 1 / 20]])
    at_entry = None
    for k in range(1, 3001):
        step()
        if k < 78:  # W (1 - r^k) and (lr/mu) W [k - (1 - r^k) / (lr s)]
            s, rest = 1.05, (1 - 0.1 * 1.05) ** k
            want = (3.1 / s * (1 - rest), 0.1 / 20 * 3.1 / s * (k - (1 - rest) / (0.1 * s)))
            got = (p.item(), optimizer.state[p]["dual"].item())
        else:  # (b, b) + (I - lr H)^(k - 78) ((W, G) - (b, b))
            got = (p.item(), optimizer.sparse_twin(p).item())
            at_entry = np.array(got) if at_entry is None else at_entry
            want = 3.1 + np.linalg.matrix_power(np.eye(2) - 0.1 * matrix, k - 78) @ (at_entry - 3.1)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-13)  # k roundings of half an ulp of 3, contracting
        if k in known:
            w, z, twin = known[k]
            assert p.item() == pytest.approx(w, abs=6e-11)  # ten digits are known
            assert optimizer.state[p]["dual"].item() == pytest.approx(z, abs=6e-11)
            assert optimizer.sparse_twin(p).item() == pytest.approx(twin, abs=6e-11)
    assert p.item() == pytest.approx(3.1, abs=1e-4)  # no bias: both end at b
    assert optimizer.sparse_twin(p).item() == pytest.approx(3.1, abs=1e-4)


@pytest.mark.parametrize(
    ("reg", "want"),
    [
        (GroupLasso(1.0, "out", "none"), [102, 179, 2980, 296]),
        (GroupLasso(0.1, "out", "sqrt_size"), [25, 39, 524, 60]),
        (GroupLasso(0.1 * math.sqrt(3), "out", "none"), [25, 39, 524, 60]),
    ],
)
def test_groups_enter_when_their_norm_says(driver, reg, want):
    p, optimizer, step = quadratic(GROUPS, driver, reg, lr=0.1, mu=20.0)
    assert entry_steps(p, optimizer, step, 4, max(want) + 1) == want


@pytest.mark.parametrize(
    ("mu", "coupling", "want"),
    [
        (20.0, "outside", [659, 924, 1397, 2083, 3803]),
        (20.0, "inside", [687, 965, 1458, 2175, 3972]),
        (1.0, "outside", [46, 60, 86, 124, 218]),
        (1.0, "inside", [70, 96, 143, 212, 383]),
    ],
)
def test_momentum_with_the_coupling_outside_and_inside(driver, mu, coupling, want):
    p, optimizer, step = quadratic(B, driver, L1(1.0), lr=0.01, mu=mu, momentum=0.9, coupling=coupling)
    count = 3 if driver.name == "emulated" else 5
    assert entry_steps(p, optimizer, step, count, want[count - 1] + 1) == want[:count]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("reg", [L1, lambda lam: GroupLasso(lam, "out")])
def test_kappa_is_a_scale_of_the_threshold(driver, reg, momentum):
    """(lr .01, kappa 10, lam 1) is (lr .1, kappa 1, lam 10), whose z is ten times as large."""
    first = quadratic(GROUPS, driver, reg(1.0), lr=0.01, kappa=10.0, mu=2.0, momentum=momentum)
    second = quadratic(GROUPS, driver, reg(10.0), lr=0.1, kappa=1.0, mu=2.0, momentum=momentum)
    for _ in range(300):
        first[2]()
        second[2]()
        torch.testing.assert_close(first[0], second[0], rtol=0, atol=1e-12)  # 300 roundings of numbers below 4
    assert 0 < int(first[1].support(first[0]).sum()) < 12
    duals = [optimizer.state[p]["dual"] for p, optimizer, _ in (first, second)]
    torch.testing.assert_close(duals[0] * 10, duals[1], rtol=1e-12, atol=1e-12)


# Recovery


@pytest.mark.parametrize(
    ("mu", "kappa", "true", "first_false"),
    [
        (10.0, 1.0, [12, 14, 16, 21, 30, 37], 236),
        (10.0, 10.0, [94, 114, 134, 181, 273, 355], 2405),
        (100.0, 1.0, [79, 94, 114, 154, 232, 305], 1934),
        (1.0, 100.0, [303, 390, 429, 555, 839, 1076], 9272),
    ],
)
def test_true_coordinates_enter_first_and_the_projection_has_no_bias(driver, mu, kappa, true, first_false):
    """200x40 normal design, noise .5. Just before the first false entry W~ is as good as the oracle's least squares."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 40))
    places = [3, 8, 13, 21, 30, 37]
    beta = np.zeros(40)
    beta[places] = (3, -2.5, 2, -1.5, 1, -0.7)
    y = x @ beta + 0.5 * rng.standard_normal(200)
    h, b = torch.tensor(x.T @ x / 200), torch.tensor(x.T @ y / 200)
    p = torch.nn.Parameter(torch.zeros(40, dtype=WIDE))
    lr = mu / (kappa * (1 + mu * np.linalg.norm(x, 2) ** 2 / 200 + 1))
    optimizer = SplitLBI([p], lr=lr, reg=L1(1.0), kappa=kappa, mu=mu, fused=driver.fused)
    entered = torch.zeros(40, dtype=torch.int64)
    error = raw = math.nan
    for k in range(1, first_false + 1):
        if k == first_false:
            raw = np.linalg.norm(p.detach().numpy() - beta) / np.linalg.norm(beta)
            with optimizer.projected():
                assert p.detach().nonzero().flatten().tolist() == places
                error = np.linalg.norm(p.detach().numpy() - beta) / np.linalg.norm(beta)
        p.grad = h @ p.detach() - b
        optimizer.step()
        entered[(entered == 0) & optimizer.support(p)] = k
    assert entered[places].tolist() == true
    rest = [i for i in range(40) if i not in places]
    assert [i for i in rest if entered[i]] == [rest[int(np.argmax(entered[rest].numpy()))]]
    assert int(entered[rest].max()) == first_false
    oracle = np.linalg.lstsq(x[:, places], y, rcond=None)[0]
    oracle_error = np.linalg.norm(oracle - beta[places]) / np.linalg.norm(beta)
    assert oracle_error == pytest.approx(0.01605, abs=5e-6)
    if kappa == 100:
        assert error == pytest.approx(0.01566, abs=5e-6)
        assert raw == pytest.approx(0.0266, abs=5e-5)
        assert error < oracle_error < raw


# Precision, torch's SGD, masks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_parameter_is_its_fp32_run_rounded(driver, dtype):
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(6, 40, generator=generator) * torch.arange(6)[:, None]).to(dtype)
    p, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    options = dict(lr=0.05, reg=GroupLasso(0.6, "out"), mu=2.0, momentum=0.5, fused=driver.fused)
    ours, theirs = SplitLBI([p], **options), SplitLBI([wide], **options)
    for _ in range(60):
        p.grad = torch.randn(6, 40, generator=generator).to(dtype)
        wide.grad = p.grad.float()
        ours.step()
        theirs.step()
    assert same_bits(p.detach(), wide.detach().to(dtype))
    for slot in ("dual", "momentum_buffer"):
        assert ours.state[p][slot].dtype == torch.float32
        assert same_bits(ours.state[p][slot], theirs.state[wide][slot])
    assert same_bits(ours.state[p]["master"], wide.detach())
    assert torch.equal(ours.support(p), theirs.support(wide))
    assert 0 < int(ours.support(p).sum()) < p.numel()
    assert ours.sparse_twin(p).dtype == dtype
    assert ours.residue(p).dtype == torch.float32
    assert ours.steps_to_entry(p) == 0


def test_a_twin_too_small_for_fp16_is_active_and_residues_do_not_overflow(driver):
    p = torch.nn.Parameter(torch.full((4,), 300.0, dtype=torch.float16))
    optimizer = SplitLBI([p], lr=1.0, reg=L1(1.0), mu=300.0, kappa=1e-6, fused=driver.fused)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.state[p]["dual"].fill_(1 + 2.0**-20)
    assert not optimizer.sparse_twin(p).any()  # 1e-12 is no fp16
    assert bool(optimizer.support(p).all())
    assert float(optimizer.residue(p)) == pytest.approx(4 * 300.0**2, rel=1e-5)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.75},
        {"momentum": 0.75, "weight_decay": 0.1},
        {"momentum": 0.75, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_without_a_twin_it_is_torchs_sgd(driver, options, maximize):
    params, twins = model(dtype=WIDE), model(dtype=WIDE)
    for coupling in ("outside", "inside"):
        ours = SplitLBI(params, lr=0.05, kappa=2.0, mu=3.0, coupling=coupling, maximize=maximize, **options)
        ours.param_groups[0]["fused"] = driver.fused
        theirs = torch.optim.SGD(twins, lr=0.1, maximize=maximize, **options)
        train(ours, params, 7)
        train(theirs, twins, 7)
        for p, q in zip(params, twins):
            torch.testing.assert_close(p, q, rtol=0, atol=7 * 10 * 16 * 2.3e-16)  # as in test_rules


def test_masked_entries_stay_zero_in_the_weights_and_in_the_twin(driver):
    params = model()
    optimizer = SplitLBI(params, lr=0.3, reg=L1(0.05), mu=1.0, momentum=0.5, fused=driver.fused)
    train(optimizer, params, 3)
    masks = [torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for p in params]
    for p, mask in zip(params, masks):
        optimizer.set_mask(p, mask)
    train(optimizer, params, 12, begin=3)
    for p, mask in zip(params, masks):
        for tensor in (p.detach(), *(optimizer.state[p][slot] for slot in ("dual", "momentum_buffer"))):
            assert not tensor[~mask].any()
            assert bool(tensor[mask].all())
        assert not optimizer.support(p)[~mask].any()
        assert bool(optimizer.support(p).any())
