"""Checkpoints whose tensors transformers renames, joins or splits when it loads them: read and written by unit."""

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from neuronrank_torch.model.weights import SafetensorsWeights, WeightSource

Shapes = dict[str, tuple[int, ...]]


@dataclass(eq=False)
class _Group:
    """Tensors of a checkpoint that together make up tensors of a model.

    Parameters
    ----------
    target : str
        Name in the model, the first one if there are several.
    converter : WeightConverter, optional
        What transformers does with the tensors; None if it only renames one.
    parts : list of (int, str)
        Names in the checkpoint, each after the number of the converter's pattern that it matches.
    """

    target: str
    converter: WeightConverter | None
    parts: list[tuple[int, str]]

    @property
    def names(self) -> list[str]:
        """Names in the checkpoint, in the order of the converter's patterns."""
        return [name for _, name in sorted(self.parts, key=lambda part: part[0])]

    def load(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """Tensors of the model, by name."""
        if self.converter is None:
            return {self.target: read(self.names[0])}
        patterns = self.converter.source_patterns
        parts = [(patterns[i], read(name)) for i, name in self.parts]
        # A converter collects the parts of one target; a thread may read the next layer meanwhile.
        return _convert(copy.deepcopy(self.converter), self.target, parts, model)

    def store(self, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Tensors of the checkpoint from those that :meth:`load` gives; the reverse of it."""
        if self.converter is None:
            return {self.names[0]: tensors[self.target]}
        back = self.converter.reverse_transform()
        renamed = [back.rename_source_key(name) for name in tensors]
        parts = [(str(pattern), tensor) for (_, pattern), tensor in zip(renamed, tensors.values(), strict=True)]
        stored = list(_convert(back, renamed[0][0], parts, model).values())
        return dict(zip(self.first(len(stored)).names, stored, strict=True))

    def first(self, parts: int) -> "_Group":
        """The group with as many parts, the first ones of each pattern: fewer where experts were removed."""
        if parts == len(self.parts):
            return self
        patterns = sorted({pattern for pattern, _ in self.parts})
        of = {pattern: [part for part in self.parts if part[0] == pattern] for pattern in patterns}
        each = parts // len(patterns)
        return _Group(self.target, self.converter, [part for pattern in patterns for part in of[pattern][:each]])


def _convert(converter: Any, target: str, parts: list[tuple[str, Tensor]], model: Any) -> dict[str, Tensor]:
    for pattern, tensor in parts:
        converter.add_tensor(target, target, pattern, tensor)
    converted = converter.convert(target, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in converted.items()}


def _find_groups(names: Iterable[str], model: Any) -> list[_Group]:
    """What ``from_pretrained`` of transformers makes of the names in a checkpoint."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(target, _Group(target, converter, []))
        # If two tensors have the same name in the model, transformers uses the first.
        if target in state and group.converter is converter and not (group.parts and converter is None):
            group.parts.append((converter.source_patterns.index(pattern) if converter else 0, name))
    return [group for group in groups.values() if group.parts]


class ConvertedWeights(WeightSource):
    """Tensors by their names in the model, made by the converters of transformers. Others keep their names.

    Parameters
    ----------
    source : WeightSource
        Tensors by their names in the checkpoint.
    model : transformers.PreTrainedModel
        May be on the meta device.
    groups : list of _Group, optional
        How they make up those of the model; found by their names if not given.
    """

    def __init__(self, source: WeightSource, model: Any, groups: list[_Group] | None = None) -> None:
        self.source, self._model = source, model
        stored = source.shapes()
        #: The group of each tensor of the model.
        self._group: dict[str, _Group] = {}
        #: What each group gives, and whether transformers can reverse that.
        self._loads: dict[_Group, Shapes] = {}
        self._reversible: set[_Group] = set()
        for group in _find_groups(stored, model) if groups is None else groups:
            # What fails here fails when transformers loads the model, which then says why.
            with suppress(Exception):
                tensors = group.load(lambda name: torch.empty(stored[name], device="meta"), model)
                self._group |= dict.fromkeys(tensors, group)
                self._loads[group] = _shapes(tensors)
                if _shapes(group.store(tensors, model)) == {name: stored[name] for name in group.names}:
                    self._reversible.add(group)

    def shapes(self) -> Shapes:
        """See :class:`WeightSource`."""
        converted = {name for group in self._loads for name in group.names}
        shapes = {name: shape for name, shape in self.source.shapes().items() if name not in converted}
        return shapes | {name: shape for loads in self._loads.values() for name, shape in loads.items()}

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        group = self._group.get(name)
        return self.source.tensor(name) if group is None else group.load(self.source.tensor, self._model)[name]

    def prefetch(self, names: Iterable[str]) -> None:
        """See :class:`WeightSource`."""
        groups = dict.fromkeys(self._group[name] for name in names if name in self._group)
        self.source.prefetch(part for group in groups for part in group.names)

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`WeightSource`."""
        stored: dict[str, Tensor] = {}
        left = dict(tensors)
        for group in dict.fromkeys(self._group[name] for name in tensors if name in self._group):
            names = self._loads[group]
            if group in self._reversible and names.keys() <= left.keys():
                stored |= group.store({name: left.pop(name) for name in names}, self._model)
        return stored | left

    def uses(self) -> dict[str, list[str]]:
        """For each tensor of the checkpoint, the tensors of the model that are made from it; none if it is not used."""
        uses: dict[str, list[str]] = {name: [] for name in self.source.shapes()}
        return uses | {name: list(loads) for group, loads in self._loads.items() for name in group.names}

    def saved(self, file: Path) -> WeightSource:
        """See :class:`WeightSource`."""
        source = SafetensorsWeights([file])
        there = source.shapes().keys()
        groups = [
            group.first(len(saved))
            for group in self._loads
            if group in self._reversible and (saved := there & set(group.names))
        ]
        return ConvertedWeights(source, self._model, groups)


def _shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
