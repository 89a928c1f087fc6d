"""A small network under SplitLBI, with twins where a test wants them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from bregman_cuda import (
    L1,
    ActivationPath,
    GroupLasso,
    SplitLBI,
    param_groups,
)


class Net(nn.Module):
    """Convolution, norm, convolution, linear; names of which one is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.aa = nn.Conv2d(6, 5, 3, bias=False)
        self.fc = nn.Linear(5 * 4, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        return self.fc(F.max_pool2d(F.relu(self.aa(x)), 2).flatten(1))


def net(lr=0.1, mu=1.0, kappa=1.0, lam=0.05, **options):
    torch.manual_seed(0)
    model = Net()
    regs = {nn.Conv2d: GroupLasso(lam, "out"), "*": L1(lam)}
    return model, SplitLBI(param_groups(model, regs), lr=lr, mu=mu, kappa=kappa, **options)


def batch(seed=0, n=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def run(model, optimizer, steps=1, seed=0):
    for i in range(steps):
        x, y = batch(seed + i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def set_dual(model, optimizer, name, dual):
    """Put a layer's twin where a test wants it."""
    param = model.get_parameter(name)
    if "dual" not in optimizer.state[param]:
        run(model, optimizer)
    optimizer.state[param]["dual"].copy_(dual)


def filters(*norms, like):
    """A dual whose filters are constant and have these norms."""
    flat = torch.tensor(norms)[:, None] / math.sqrt(like[0].numel()) * torch.ones(len(norms), like[0].numel())
    return flat.view(like.shape)


def exact(lam=1.0):
    """A net whose convolutions have unweighted groups: a filter is on when the norm of its dual is above lam."""
    torch.manual_seed(0)
    model = Net()
    regs = {nn.Conv2d: GroupLasso(lam, "out", "none"), "*": L1(lam)}
    return model, SplitLBI(param_groups(model, regs), lr=0.01, mu=10.0)


def recorded():
    """Filters of `a` entered in epochs 0 2 - 0 1 -; of the third and last one the last is nearer to entering."""
    model, optimizer = exact()
    path = ActivationPath(model, optimizer)
    for epoch, norms in enumerate([(3, 0, 0, 2, 0, 0), (3, 0, 0, 2, 1.5, 0), (3, 9, 0.2, 2, 0.9, 0.7)]):
        set_dual(model, optimizer, "a.weight", filters(*norms, like=model.a.weight))
        path.update(epoch)
    return model, optimizer, path


def biases_with_twins():
    """A convolution whose biases have a twin, too, with biases in an order of entry that is not that of its filters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    optimizer = SplitLBI(model.parameters(), lr=0.5, reg=L1(1.0), mu=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[model[0].weight]["dual"].copy_(filters(90, 80, 0, 0, like=model[0].weight))
    optimizer.state[model[0].bias]["dual"].copy_(torch.tensor([3.0, 0, 4, 0]))
    model[0].bias.data.copy_(torch.tensor([4.0, 3, 2, 1]))
    path = ActivationPath(model, optimizer)
    path.update(0)
    return model, optimizer, path


def quadratic(b, driver, reg, **options):
    """A parameter at zero, its optimizer, and a step on |w - b|^2 / 2."""
    b = torch.tensor(b, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros_like(b))
    optimizer = SplitLBI([p], reg=reg, fused=driver.fused, **options)

    def step() -> None:
        p.grad = p.detach() - b
        optimizer.step()

    return p, optimizer, step
