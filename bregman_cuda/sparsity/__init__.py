"""Sparse starts, parameter groups and density reports."""

from .groups import param_groups as param_groups
from .init import SparseInitReport as SparseInitReport
from .init import sparse_init_ as sparse_init_
from .report import DensityReport as DensityReport
from .report import DensityRow as DensityRow
from .report import density as density
from .rigl import RigL as RigL

__all__ = ["DensityReport", "DensityRow", "RigL", "SparseInitReport", "density", "param_groups", "sparse_init_"]
