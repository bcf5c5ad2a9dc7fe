"""Methods that score the experts of a mixture and nothing else, one file each, found in this folder."""

from neuronrank_core.methods.base import ExpertMethod
from neuronrank_core.registry import declared

#: Every method by name.
EXPERT_METHODS: dict[str, ExpertMethod] = {
    method.name: method for method in declared(__name__, __path__, "METHOD", besides=()).values()
}
