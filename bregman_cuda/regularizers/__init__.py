"""Regularizers: a scalar penalty per element, per group norm, or both. One file per penalty."""

from ._base import Grouped as Grouped
from ._base import Regularizer as Regularizer
from ._base import Separable as Separable
from .elastic_net import ElasticNet as ElasticNet
from .envelope import GroupEnvelope as GroupEnvelope
from .group_lasso import GroupLasso as GroupLasso
from .group_lasso import SparseGroupLasso as SparseGroupLasso
from .l0 import L0 as L0
from .l0 import GroupL0 as GroupL0
from .l1 import L1 as L1
from .l_half import GroupLHalf as GroupLHalf
from .l_half import LHalf as LHalf
from .l_two_thirds import GroupLTwoThirds as GroupLTwoThirds
from .l_two_thirds import LTwoThirds as LTwoThirds
from .mcp import MCP as MCP
from .mcp import GroupMCP as GroupMCP
from .nonneg_l1 import NonnegL1 as NonnegL1
from .nuclear import Nuclear as Nuclear
from .scad import SCAD as SCAD
from .scad import GroupSCAD as GroupSCAD
