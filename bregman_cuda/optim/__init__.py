"""Optimizers, one file each. `_base` holds what they share, `_plan` the hot path."""

from ._base import SparseOptimizer as SparseOptimizer
from .adabreg import AdaBreg as AdaBreg
from .averaged_proxsgd import AveragedProxSGD as AveragedProxSGD
from .hspg import HSPG as HSPG
from .linbreg import LinBreg as LinBreg
from .proxadam import ProxAdam as ProxAdam
from .proxsgd import ProxSGD as ProxSGD
from .rmda import RAMDA as RAMDA
from .rmda import RMDA as RMDA
from .splitlbi import SplitLBI as SplitLBI
from .splitlbi import stable_rate as stable_rate
from .stages import MomentumGrowth as MomentumGrowth
from .stages import Restarts as Restarts
