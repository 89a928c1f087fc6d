"""What is true, by routes that import nothing of the package: brute force, optimality conditions, numpy formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2

# Scalar penalties phi(x) as written in the literature; infinity is a constraint.
PHI: dict[str, Callable[..., float]] = {
    "L1": lambda x, lam: lam * abs(x),
    "NonnegL1": lambda x, lam: lam * x if x >= 0 else math.inf,
    "ElasticNet": lambda x, lam, l2: lam * abs(x) + 0.5 * l2 * x * x,
    "L0": lambda x, lam: lam * (x != 0),
    "LHalf": lambda x, lam: lam * math.sqrt(abs(x)),
    "LTwoThirds": lambda x, lam: lam * abs(x) ** (2 / 3),
    "MCP": lambda x, lam, gamma: (
        lam * abs(x) - x * x / (2 * gamma) if abs(x) <= gamma * lam else 0.5 * gamma * lam * lam
    ),
    "SCAD": lambda x, lam, a: (
        lam * abs(x)
        if abs(x) <= lam
        else (2 * a * lam * abs(x) - x * x - lam * lam) / (2 * (a - 1))
        if abs(x) <= a * lam
        else 0.5 * lam * lam * (a + 1)
    ),
}


def least_objective(phi: Callable[[float], float], x: float, step: float) -> float:
    """min over z of step * phi(z) + (z - x)^2 / 2: a grid that holds 0 and x, then golden sections around each of its
    local minima (an objective that is not convex has several)."""

    def objective(z: float) -> float:
        return step * phi(z) + 0.5 * (z - x) ** 2

    reach = abs(x) + 1.0
    grid = sorted({*np.linspace(-reach, reach, 401).tolist(), 0.0, x})
    at = [math.inf, *map(objective, grid), math.inf]
    least = min(at)
    for i in range(len(grid)):
        if at[i + 1] == math.inf or not at[i] >= at[i + 1] <= at[i + 2]:
            continue
        low, high = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
        for _ in range(80):
            left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            if objective(left) <= objective(right):
                high = right
            else:
                low = left
            least = min(least, objective(left), objective(right))
    return least


def excess(phi: Callable[[float], float], x: float, z: float, step: float) -> float:
    """How much worse z is than the best point."""
    return step * phi(z) + 0.5 * (z - x) ** 2 - least_objective(phi, x, step)


def sparse_group_residual(x: np.ndarray, z: np.ndarray, l1: float, l2: float) -> float:
    """Distance of 0 from the subdifferential of  l1 |z|_1 + l2 ||z||_2 + ||z - x||^2 / 2  at z (one group, float64)."""
    inside = np.maximum(np.abs(x) - l1, 0)  # distance of x_i from [-l1, l1]
    norm = np.linalg.norm(z)
    if norm == 0:
        return max(0.0, float(np.linalg.norm(inside)) - l2)
    smooth = z - x + l2 * z / norm
    rest = np.where(z == 0, np.maximum(np.abs(smooth) - l1, 0), np.abs(smooth + l1 * np.sign(z)))
    return float(np.linalg.norm(rest))


def project_ball(x: np.ndarray, radius: float) -> np.ndarray:
    """Nearest point of the Euclidean ball."""
    norm = np.linalg.norm(x)
    return x if norm <= radius else x * (radius / norm)


def central_difference(
    value: Callable[[np.ndarray], float], x: np.ndarray, direction: np.ndarray, h: float = 1e-5
) -> float:
    """Derivative of `value` at x along a direction, to O(h^2)."""
    return (value(x + h * direction) - value(x - h * direction)) / (2 * h)


def soft(x: np.ndarray, t: float) -> np.ndarray:
    """Soft threshold."""
    return np.sign(x) * np.maximum(np.abs(x) - t, 0)


def linbreg(p0, grads, lrs, lam, delta=1.0):
    """Bungert et al. 2022, algorithm 1, with J = lam |.|_1."""
    v = p0 / delta + lam * np.sign(p0)
    p = p0
    for g, lr in zip(grads, lrs):
        v = v - lr * g
        p = delta * soft(v, lam)
    return p


def linbreg_paper(p0, grads, lrs, lam, delta=1.0, momentum=0.0):
    """Algorithm 2: the step size sits inside the moving average."""
    v, m, p = p0 / delta + lam * np.sign(p0), np.zeros_like(p0), p0
    for g, lr in zip(grads, lrs):
        m = momentum * m + (1 - momentum) * lr * g
        v = v - m
        p = delta * soft(v, lam)
    return p


def linbreg_torch(p0, grads, lrs, lam, delta=1.0, momentum=0.0):
    """Momentum as in torch.optim.SGD: the step size sits outside."""
    v, m, p = p0 / delta + lam * np.sign(p0), np.zeros_like(p0), p0
    for g, lr in zip(grads, lrs):
        m = momentum * m + g
        v = v - lr * m
        p = delta * soft(v, lam)
    return p


def adabreg(p0, grads, lrs, lam, delta=1.0, betas=(0.9, 0.999), eps=1e-8):
    """Algorithm 3, with both moments corrected."""
    v, m, s, p = p0 / delta + lam * np.sign(p0), np.zeros_like(p0), np.zeros_like(p0), p0
    for k, (g, lr) in enumerate(zip(grads, lrs), 1):
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * g**2
        v = v - lr * (m / (1 - betas[0] ** k)) / (np.sqrt(s / (1 - betas[1] ** k)) + eps)
        p = delta * soft(v, lam)
    return p


def proxsgd(p0, grads, lrs, lam, momentum=0.0):
    """Forward-backward splitting, with the heavy ball in the gradient."""
    p, m = p0, np.zeros_like(p0)
    for g, lr in zip(grads, lrs):
        m = momentum * m + g
        p = soft(p - lr * m, lr * lam)
    return p


def averaged_proxsgd(p0, grads, lrs, lam, powers=(0.25, 0.5), rho=0.9, beta=0.999, eps=1e-8):
    """Yang et al. 2020: the unit step in the metric tau, then the average; steps count from 1."""
    p, v, r = p0, np.zeros_like(p0), np.zeros_like(p0)
    for t, (g, lr) in enumerate(zip(grads, lrs), 1):
        rho_t, eps_t = rho / (t + 4) ** powers[1], min(lr / (t + 4) ** powers[0], 1)
        v = (1 - rho_t) * v + rho_t * g
        r = beta * r + (1 - beta) * g**2
        tau = np.sqrt(r / (1 - beta**t)) + eps
        p = p + eps_t * (soft(p - v / tau, lam / tau) - p)
    return p


def _moments(grads, betas, amsgrad):
    """Adam's m and v (with AMSGrad the largest v) and both corrections, step by step."""
    m, v, largest = 0.0, 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        largest = np.maximum(largest, v)
        yield m, largest if amsgrad else v, 1 - betas[0] ** t, 1 - betas[1] ** t


def proxadam_consistent(p0, grads, lrs, lam, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
    """One corrected step lr / c1 for gradient and threshold."""
    p = p0
    for lr, (m, v, c1, c2) in zip(lrs, _moments(grads, betas, amsgrad)):
        d = np.sqrt(v / c2) + eps
        p = p - lr * weight_decay * p
        p = soft(p - lr / c1 * m / d, lr / c1 * lam / d)
    return p


def proxadam_proxgen(p0, grads, lrs, lam, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
    """ProxGen's code: corrected moments, the bare lr in the threshold, decay before the step."""
    p = p0
    for lr, (m, v, c1, c2) in zip(lrs, _moments(grads, betas, amsgrad)):
        d = np.sqrt(v / c2) + eps
        p = p - lr * weight_decay * p
        p = soft(p - lr * (m / c1) / d, lr * lam / d)
    return p


def proxadam_proxssi(p0, grads, lrs, lam, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
    """ProxSSI's code: the metric is not corrected, its correction sits in the step, decay after the step."""
    p = p0
    for lr, (m, v, c1, c2) in zip(lrs, _moments(grads, betas, amsgrad)):
        d = np.sqrt(v) + eps
        p = p - lr * np.sqrt(c2) / c1 * m / d
        p = p - lr * weight_decay * p
        p = soft(p, lr * lam / d)
    return p


def dual_averages(p0, grads, lrs, momentum, subproblem):
    """RMDA and RAMDA: p after each average with argmin_q of what `subproblem(t, V, U, alpha)` minimises."""
    v, u, alpha, p = np.zeros_like(p0), np.zeros_like(p0), 0.0, p0
    for t, (g, lr) in enumerate(zip(grads, lrs), 1):
        s = lr * math.sqrt(t)
        v, u, alpha = v + s * g, u + s * g**2, alpha + s
        q = subproblem(t, v, u, alpha)
        p = (1 - momentum) * p + momentum * q
    return p


def rmda(p0, grads, lrs, lam, momentum=1.0):
    """argmin <V, q> + sqrt(t) ||q - x0||^2 / 2 + alpha lam |q|_1: sqrt(t) (q - x0) + V + alpha lam sign(q) = 0."""

    def subproblem(t, v, u, alpha):
        return soft(math.sqrt(t) * p0 - v, alpha * lam) / math.sqrt(t)

    return dual_averages(p0, grads, lrs, momentum, subproblem)


def ramda(p0, grads, lrs, lam, momentum=1.0, eps=1e-6):
    """argmin <V, q> + sum P (q - x0)^2 / 2 + alpha lam |q|_1: P (q - x0) + V + alpha lam sign(q) = 0."""

    def subproblem(t, v, u, alpha):
        metric = np.cbrt(u) + eps
        return soft(metric * p0 - v, alpha * lam) / metric

    return dual_averages(p0, grads, lrs, momentum, subproblem)


def weighted_group_residual(x: np.ndarray, z: np.ndarray, s: np.ndarray, l1: float, l2: float) -> float:
    """Distance of 0 from the subdifferential of  l1 |z|_1 + l2 ||z||_2 + sum (z - x)^2 / (2 s)  at z (one group)."""
    norm, pull = np.linalg.norm(z), (z - x) / s
    if norm == 0:
        return max(0.0, float(np.linalg.norm(np.maximum(np.abs(pull) - l1, 0))) - l2)
    smooth = pull + l2 * z / norm
    rest = np.where(z == 0, np.maximum(np.abs(smooth) - l1, 0), np.abs(smooth + l1 * np.sign(z)))
    return float(np.linalg.norm(rest))


def weighted_group_lasso(x: np.ndarray, s: np.ndarray, w: float) -> np.ndarray:
    """argmin  w ||z||_2 + sum (z - x)^2 / (2 s)  by 200 bisections for theta = ||z|| (one group)."""
    if np.linalg.norm(x / s) <= w:
        return np.zeros_like(x)
    low, high = 0.0, float(np.linalg.norm(x))
    for _ in range(200):
        theta = 0.5 * (low + high)
        low, high = (theta, high) if np.sum((x / (theta + w * s)) ** 2) > 1 else (low, theta)
    return x * theta / (theta + w * s)


def weighted_objective(phi: Callable[[float], float], x: np.ndarray, z: np.ndarray, s: np.ndarray) -> float:
    """phi(||z||) + sum (z - x)^2 / (2 s)  (one group)."""
    return phi(float(np.linalg.norm(z))) + 0.5 * float(np.sum((z - x) ** 2 / s))


def least_weighted_objective(phi: Callable[[float], float], x: np.ndarray, s: np.ndarray) -> float:
    """The least of it over all z: the best z of norm t is x / (1 + rho s) for some rho >= 0, so that a dense scan over
    rho, and golden sections around each of its local minima, find it."""

    def objectives(log_rho: np.ndarray) -> list[float]:
        z = x / (1 + np.exp(log_rho)[:, None] * s)
        fit = 0.5 * np.sum((z - x) ** 2 / s, axis=1)
        return [phi(t) + f for t, f in zip(np.linalg.norm(z, axis=1).tolist(), fit.tolist())]

    grid = np.linspace(-math.log(s.max()) - 40, -math.log(s.min()) + 40, 500)
    at = [math.inf, *objectives(grid), math.inf]
    least = min(weighted_objective(phi, x, x, s), weighted_objective(phi, x, np.zeros_like(x), s))
    for i in range(len(grid)):
        if not at[i] >= at[i + 1] <= at[i + 2] or at[i] == at[i + 2]:
            continue
        low, high = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
        for _ in range(45):
            left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            a, b = objectives(np.array([left, right]))
            low, high = (low, right) if a <= b else (left, high)
        least = min(least, *objectives(np.array([low, high])), at[i + 1])
    return least


def splitlbi(p0, grads, lrs, lam, momentum=0.0, *, kappa=1.0, mu=2.0, nesterov=False, weight_decay=0.0, inside=False):
    """FuSplit LBI (research notes on SplitLBI, section 1): all from the old weights and the old twin."""
    w, z, m = p0.astype(np.float64).copy(), np.zeros(p0.shape), np.zeros(p0.shape)
    for g, lr in zip(grads, lrs):
        coupling = (w - kappa * soft(z, lam)) / mu
        d = g + weight_decay * w + (coupling if inside else 0)
        m = momentum * m + d
        step = d + momentum * m if nesterov else m
        w = w - kappa * lr * (step + (0 if inside else coupling))
        z = z + lr * coupling
    return w
