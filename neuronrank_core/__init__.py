"""NeuronRank's reference: the mathematics, in NumPy alone.

Score and prune neurons of any model by how strongly (TF) and how selectively (IDF) they fire. Other packages may
run the same kernels faster; what a number means is defined here.
"""

from neuronrank_core.context import ScoringContext
from neuronrank_core.errors import (
    AllZeroMetricError,
    InputError,
    InvalidValueError,
    MissingStatisticsError,
    NeuronRankError,
    NonFiniteError,
)
from neuronrank_core.estimator import NeuronRank
from neuronrank_core.masking import prune_mask
from neuronrank_core.methods import METHODS, Method
from neuronrank_core.neurons import NeuronStatistics
from neuronrank_core.recipe import PRESETS, Recipe
from neuronrank_core.selection import lowest_k, select
from neuronrank_core.statistics import LayerStatistics, document_statistics, merge
from neuronrank_core.statistics_io import load_statistics, save_statistics
from neuronrank_core.version import __version__

__all__ = [
    "METHODS",
    "PRESETS",
    "AllZeroMetricError",
    "InputError",
    "InvalidValueError",
    "LayerStatistics",
    "Method",
    "MissingStatisticsError",
    "NeuronRank",
    "NeuronRankError",
    "NeuronStatistics",
    "NonFiniteError",
    "Recipe",
    "ScoringContext",
    "__version__",
    "document_statistics",
    "load_statistics",
    "lowest_k",
    "merge",
    "prune_mask",
    "save_statistics",
    "select",
]
