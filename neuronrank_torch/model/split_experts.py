"""Checkpoints that store each expert separately, for models that store all experts of a layer in fused tensors."""

import re
from collections.abc import Iterable

from torch import Tensor

from neuronrank_torch.model.weights import WeightSource

#: Gate, up and down of one expert; w1, w3 and w2 in Mixtral's checkpoints.
_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<role>gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
#: Parts of a fused tensor, stacked along its rows.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def whole_experts(source: WeightSource) -> WeightSource:
    """The source itself; if it stores experts separately, a source that fuses them."""
    return SplitExperts(source) if any(map(_EXPERT.fullmatch, source.shapes())) else source


class SplitExperts(WeightSource):
    """Tensors by their names in the model, fused from those of single experts.

    Parameters
    ----------
    source : WeightSource
        Tensors by their names in the checkpoint.
    """

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        #: Name in the checkpoint by name in the model; for a fused tensor, those of all its parts in their order.
        self._parts: dict[str, list[str]] = {}
        #: Shapes of the fused tensors. A layer that is not complete has none.
        self._fused: dict[str, tuple[int, ...]] = {}
        shapes = source.shapes()
        found: dict[str, dict[tuple[int, str], str]] = {}
        for name in shapes:
            inside = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's checkpoints.
            match = _EXPERT.fullmatch(inside)
            if match is None:
                self._parts[inside] = [name]
            else:
                role = _ROLES.get(match["role"], match["role"])
                found.setdefault(match["experts"], {})[int(match["number"]), role] = name
        for experts, names in found.items():
            count = 1 + max(number for number, _ in names)
            for fused, roles in _FUSED.items():
                parts = [names.get((number, role), "") for number in range(count) for role in roles]
                shape, *others = {shapes.get(part) for part in parts}
                if shape is not None and not others:
                    self._parts[f"{experts}.{fused}"] = parts
                    self._fused[f"{experts}.{fused}"] = (count, len(roles) * shape[0], *shape[1:])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        shapes = self.source.shapes()
        return {name: self._fused.get(name) or shapes[parts[0]] for name, parts in self._parts.items()}

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        parts = self._parts[name]
        first = self.source.tensor(parts[0])
        if name not in self._fused:
            return first
        whole = first.new_empty(len(parts), *first.shape)
        for place, part in zip(whole, parts, strict=True):
            place.copy_(self.source.tensor(part))
        return whole.view(self._fused[name])

    def prefetch(self, names: Iterable[str]) -> None:
        """See :class:`WeightSource`."""
        self.source.prefetch(part for name in names for part in self._parts[name])

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`WeightSource`."""
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = self._parts[name]
            pieces = tensor.flatten(0, 1).chunk(len(parts)) if name in self._fused else [tensor]
            stored |= zip(parts, pieces, strict=True)
        return stored
