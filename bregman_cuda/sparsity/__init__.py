"""Sparse starts, parameter groups, density reports; SplitLBI's path: pruning, tickets, statistics, growing."""

from .activation_path import ActivationPath as ActivationPath
from .groups import param_groups as param_groups
from .init import SparseInitReport as SparseInitReport
from .init import sparse_init_ as sparse_init_
from .pruning import prune_by_order as prune_by_order
from .report import DensityReport as DensityReport
from .report import DensityRow as DensityRow
from .report import density as density
from .resize import LayerSize as LayerSize
from .resize import TopFilters as TopFilters
from .resize import active_fraction as active_fraction
from .resize import extract_top_filters as extract_top_filters
from .resize import grow_layer as grow_layer
from .resize import layer_sizes as layer_sizes
from .restart import hold_active as hold_active
from .restart import reinitialize_filters as reinitialize_filters
from .restart import scale_filters as scale_filters
from .rigl import RigL as RigL
from .statistics import Statistics as Statistics
from .statistics import StatisticsRecorder as StatisticsRecorder
from .statistics import read_statistics as read_statistics
from .tickets import MaskedTraining as MaskedTraining
from .tickets import Ticket as Ticket
from .tickets import TicketRecorder as TicketRecorder
from .tickets import load_ticket as load_ticket
from .tickets import masked as masked
from .tickets import rewind as rewind
from .tickets import save_ticket as save_ticket

__all__ = [
    "ActivationPath",
    "DensityReport",
    "DensityRow",
    "LayerSize",
    "MaskedTraining",
    "RigL",
    "SparseInitReport",
    "Statistics",
    "StatisticsRecorder",
    "Ticket",
    "TicketRecorder",
    "TopFilters",
    "active_fraction",
    "density",
    "extract_top_filters",
    "grow_layer",
    "hold_active",
    "layer_sizes",
    "load_ticket",
    "masked",
    "param_groups",
    "prune_by_order",
    "read_statistics",
    "reinitialize_filters",
    "rewind",
    "save_ticket",
    "scale_filters",
    "sparse_init_",
]
