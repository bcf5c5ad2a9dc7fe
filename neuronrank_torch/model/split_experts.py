"""Checkpoints that store each expert separately, for models that store all experts of a layer in fused tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
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
        #: Name in the checkpoint by name in the model, for tensors that do not belong to an expert.
        self._plain: dict[str, str] = {}
        #: Names in the checkpoint of the parts of each expert, by name of the fused tensor.
        self._fused: dict[str, list[tuple[str, ...]]] = {}
        found: dict[str, dict[tuple[int, str], str]] = {}
        for name in source.shapes():
            inside = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's checkpoints.
            match = _EXPERT.fullmatch(inside)
            if match is None:
                self._plain[inside] = name
            else:
                role = _ROLES.get(match["role"], match["role"])
                found.setdefault(match["experts"], {})[int(match["number"]), role] = name
        for experts, parts in found.items():
            self._fuse(experts, parts)

    def _fuse(self, experts: str, parts: Mapping[tuple[int, str], str]) -> None:
        """Record the parts of a layer's fused tensors. A layer that is not complete gets none."""
        numbers = range(1 + max(number for number, _ in parts))
        for fused, roles in _FUSED.items():
            names = [tuple(parts.get((number, role), "") for role in roles) for number in numbers]
            shapes = {self.source.shapes().get(part) for expert in names for part in expert}
            if len(shapes) == 1 and None not in shapes:
                self._fused[f"{experts}.{fused}"] = names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`WeightSource`."""
        parts = self.source.shapes()
        shapes = {name: parts[stored] for name, stored in self._plain.items()}
        for name, experts in self._fused.items():
            rows, *columns = parts[experts[0][0]]
            shapes[name] = (len(experts), len(experts[0]) * rows, *columns)
        return shapes

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        if name in self._plain:
            return self.source.tensor(self._plain[name])
        experts = self._fused[name]
        whole = self.source.tensor(experts[0][0]).new_empty(self.shapes()[name])
        for place, parts in zip(whole, experts, strict=True):
            torch.cat([self.source.tensor(part) for part in parts], out=place)
        return whole

    def prefetch(self, names: Iterable[str]) -> None:
        """See :class:`WeightSource`."""
        self.source.prefetch(stored for name in names for stored in self._stored(name))

    def _stored(self, name: str) -> list[str]:
        return [self._plain[name]] if name in self._plain else [part for parts in self._fused[name] for part in parts]

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`WeightSource`."""
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = [tensor] if name in self._plain else [p for t in tensor for p in t.chunk(len(self._fused[name][0]))]
            stored |= zip(self._stored(name), parts, strict=True)
        return stored
