"""The reference is NumPy only, and its public names are pinned."""

from __future__ import annotations

import subprocess
import sys

import neuronrank_core

HEAVY = ("torch", "transformers", "sklearn", "scipy", "click", "rich", "gguf", "datasets")

IMPORT_ALL = f"""
import sys
from importlib import import_module
from pkgutil import walk_packages
import neuronrank_core
for module in walk_packages(neuronrank_core.__path__, "neuronrank_core."):
    import_module(module.name)
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_importing_the_core_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_public_names_are_pinned() -> None:
    assert sorted(neuronrank_core.__all__) == sorted(
        [
            "AllZeroMetricError",
            "InputError",
            "InvalidValueError",
            "LayerStatistics",
            "METHODS",
            "Method",
            "MissingStatisticsError",
            "NeuronRank",
            "NeuronRankError",
            "NeuronStatistics",
            "NonFiniteError",
            "PRESETS",
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
    )
    assert all(hasattr(neuronrank_core, name) for name in neuronrank_core.__all__)
