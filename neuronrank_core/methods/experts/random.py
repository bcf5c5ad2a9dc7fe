"""Random experts: a baseline to compare other methods with."""

from zlib import crc32

import numpy as np

from neuronrank_core.kernels import Vector
from neuronrank_core.methods.base import ExpertMethod
from neuronrank_core.methods.context import ScoringContext
from neuronrank_core.recipe import Recipe


class Random(ExpertMethod):
    """A random order of the experts, another one in every layer and for every seed."""

    name = "random"
    summary = "experts: at random, by --seed"
    reads = frozenset({"seed"})

    def expert_score(self, context: ScoringContext) -> Vector:
        """Score every expert by a random number between 0 and 1."""
        rng = np.random.default_rng([context.recipe.seed, crc32(str(context.layer).encode())])
        return 1 - rng.random(context.terms)

    def expert_requires(self, recipe: Recipe) -> frozenset[str]:
        """Nothing."""
        del recipe
        return frozenset()


METHOD = Random()
