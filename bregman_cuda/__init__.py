"""Fused sparse-training optimizers for PyTorch: networks that become sparse while they train."""

from ._backend import build_info as build_info
from ._version import __version__ as __version__
from .optim import AdaBreg as AdaBreg
from .optim import LinBreg as LinBreg
from .optim import ProxSGD as ProxSGD
from .optim import SparseOptimizer as SparseOptimizer
from .regularizers import L1 as L1
from .regularizers import ElasticNet as ElasticNet
from .regularizers import GroupEnvelope as GroupEnvelope
from .regularizers import GroupLasso as GroupLasso
from .regularizers import NonnegL1 as NonnegL1
from .regularizers import Nuclear as Nuclear
from .regularizers import Regularizer as Regularizer
from .regularizers import SparseGroupLasso as SparseGroupLasso
from .sparsity import DensityReport as DensityReport
from .sparsity import RigL as RigL
from .sparsity import density as density
from .sparsity import param_groups as param_groups
from .sparsity import sparse_init_ as sparse_init_
