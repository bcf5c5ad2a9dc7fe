"""NeuronRank's reference implementation in NumPy.

Score and prune neurons of any model by how strongly (TF) and how selectively (IDF) they fire. Other packages may
run the same kernels faster; their results are defined here.
"""

from neuronrank_core.errors import (
    AllZeroMetricError,
    InputError,
    InvalidValueError,
    MissingStatisticsError,
    NeuronRankError,
    NonFiniteError,
    UnsupportedModelError,
)
from neuronrank_core.estimator import NeuronRank
from neuronrank_core.kernels import lowest_k
from neuronrank_core.methods import METHODS
from neuronrank_core.methods.base import Method
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.recipe import PRESETS, Recipe
from neuronrank_core.selection.masks import prune_mask
from neuronrank_core.selection.patterns import select
from neuronrank_core.statistics.neurons import NeuronStatistics
from neuronrank_core.statistics.table import LayerStatistics, document_statistics, merge
from neuronrank_core.statistics.table_files import load_statistics, save_statistics
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
    "UnsupportedModelError",
    "__version__",
    "document_statistics",
    "load_statistics",
    "lowest_k",
    "merge",
    "prune_mask",
    "save_statistics",
    "select",
]
