"""Optimizers, one file each. `_base` holds what they share, `_plan` the hot path."""

from ._base import SparseOptimizer as SparseOptimizer
from .adabreg import AdaBreg as AdaBreg
from .linbreg import LinBreg as LinBreg
from .proxsgd import ProxSGD as ProxSGD
