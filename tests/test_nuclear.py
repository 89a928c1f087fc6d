"""Nuclear against its definition."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from harness import same_bits
from small import reg_distance

from bregman_cuda import (
    Nuclear,
)


def singular_values(x: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(x.double().numpy().reshape(len(x), -1), compute_uv=False)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 2, 2, 2), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nuclear_prox_thresholds_singular_values(shape, dtype):
    eps = torch.finfo(dtype).eps
    reg = Nuclear(0.8)
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    z = reg.prox(x, 1.5)
    expected = np.maximum(singular_values(x) - 1.2, 0)
    np.testing.assert_allclose(singular_values(z), expected, rtol=0, atol=50 * eps)
    assert reg.rank(z) == int((expected > 0).sum())
    assert float(reg.value(z)) == pytest.approx(0.8 * expected.sum(), rel=50 * eps, abs=50 * eps)
    assert z.shape == x.shape
    smallest = min(expected[expected > 0], default=1.0)  # its vectors are known to eps / smallest
    assert reg_distance(reg, z, (z - x) / 1.5) <= 100 * eps / min(1.0, smallest), "optimal"
    planted = (z - x) / 1.5 + 0.1
    assert reg_distance(reg, z, planted) >= 0.05


def test_nuclear_prox_of_a_known_matrix_is_exact_in_rank():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))
    x = torch.tensor((q[:, :10] * np.arange(1, 11)) @ q[:10], dtype=torch.float32)
    for threshold in (0.5, 3.5, 9.5):
        assert Nuclear(1.0).rank(Nuclear(1.0).prox(x, threshold)) == 10 - int(threshold)
    gone = Nuclear(1.0).prox(x, 10.5)
    assert torch.equal(gone, torch.zeros_like(gone)), "rank 0 is exactly zero"


def test_nuclear_prox_is_no_worse_than_its_neighbours():
    reg, generator = Nuclear(0.5), torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    z = reg.prox(x, 1.0)

    def objective(at):
        return float(reg.value(at) + 0.5 * (at - x).square().sum())

    for scale in (1.0, 1e-2, 1e-4):
        for _ in range(50):
            assert objective(z) <= objective(z + scale * torch.randn(4, 3, dtype=torch.float64, generator=generator))


def test_nuclear_distance_of_a_diagonal_matrix():
    """At diag(1, 0) with lam = 1 only the last entry has room: (a + 1)^2 + b^2 + c^2 + (|d| - 1)_+^2, by hand."""
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for a, b, c, d in ((-1, 0, 0, 0.9), (-1, 0, 0, -1.5), (0, 0, 0.4, 0.9), (0, 0.4, 0, 0.9), (-2, 0.3, -0.2, 3)):
        expected = math.sqrt((a + 1) ** 2 + b**2 + c**2 + max(abs(d) - 1, 0) ** 2)
        found = reg_distance(Nuclear(1.0), x, torch.tensor([[a, b], [c, d]], dtype=torch.float64))
        assert found == pytest.approx(expected, abs=1e-14)


def test_nuclear_subgradient_and_lam_max():
    reg = Nuclear(0.6)
    x = np.random.default_rng(2).standard_normal((4, 2, 3))
    slope = reg.subgradient(torch.tensor(x)).numpy()
    for i in range(5):
        way = np.random.default_rng(i).standard_normal(x.shape)
        found = oracles.central_difference(lambda at: float(reg.value(torch.tensor(at))), x, way)
        assert found == pytest.approx(float((slope * way).sum()), abs=1e-8)
    leaf = torch.tensor(x, requires_grad=True)
    reg.value(leaf).backward()
    np.testing.assert_allclose(leaf.grad.numpy(), slope, atol=1e-13)
    zero = torch.zeros(3, 4, requires_grad=True)
    reg.value(zero).backward()
    assert torch.equal(zero.grad, torch.zeros(3, 4))
    assert torch.equal(reg.subgradient(zero.detach()), torch.zeros(3, 4))
    grad = torch.tensor(x)
    bound = reg.lam_max(grad)
    assert bound == pytest.approx(singular_values(grad)[0])
    for factor, stays in ((1.001, True), (0.999, False)):
        assert (reg_distance(Nuclear(factor * bound), torch.zeros_like(grad), grad) == 0) == stays


def test_named_cases_of_nuclear():
    x = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert same_bits(Nuclear(0.0).prox(x, 0.5), x)
    assert Nuclear(0.3).prox(x, 0.5).stride() == x.stride()
    assert Nuclear(0.3).prox(x.bfloat16(), 0.5).dtype == torch.bfloat16
    x[0, 0, 0, 0] = math.nan
    assert bool(Nuclear(0.3).prox(x, 0.5).isnan().all())
    assert Nuclear(0.3).prox(torch.ones(0, 3), 0.5).shape == (0, 3)
    assert Nuclear(0.3).lam_max(torch.ones(3, 0)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nonfinite_entries_give_nan(dtype, bad):
    """Where a decomposition would raise."""
    reg, x, good = Nuclear(0.3), torch.ones(3, 2, 2, dtype=dtype), torch.ones(3, 2, 2, dtype=dtype)
    x[1, 0, 1] = bad
    assert bool(reg.value(x).isnan())
    assert math.isnan(reg.lam_max(x))
    for found in (reg.prox(x, 0.5), reg.subgradient(x), reg.subdiff_distance(x, good), reg.subdiff_distance(good, x)):
        assert bool(found.isnan().all())
    for step in (0.0, torch.zeros((), dtype=dtype)):
        assert same_bits(reg.prox(x, step), x)
    assert same_bits(Nuclear(0.0).prox(x, 0.5), x), "lam = 0 is the identity"


def test_a_tensor_lam_of_one_element_keeps_the_value_a_number():
    x = torch.eye(3)
    assert torch.equal(Nuclear(torch.tensor([0.5])).value(x), torch.tensor(1.5))
