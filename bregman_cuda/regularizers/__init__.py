"""Regularizers: a scalar penalty per element, per group norm, or both. One file per penalty."""

from ._base import Grouped as Grouped
from ._base import Regularizer as Regularizer
from ._base import Separable as Separable
from .elastic_net import ElasticNet as ElasticNet
from .envelope import GroupEnvelope as GroupEnvelope
from .group_lasso import GroupLasso as GroupLasso
from .group_lasso import SparseGroupLasso as SparseGroupLasso
from .l1 import L1 as L1
from .nonneg_l1 import NonnegL1 as NonnegL1
from .nuclear import Nuclear as Nuclear
