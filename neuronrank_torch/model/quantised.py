"""Checkpoints with quantised weights: which of them are read, and their tensors, dequantised when they are read."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import FineGrainedFP8Config

from neuronrank_core.errors import InputError
from neuronrank_torch.model.weights import SafetensorsWeights, WeightSource

Shape = tuple[int, ...]
_INCOMPLETE = "download it again, or prune the unquantised original"


def take_quantisation(folder: object, config: Any) -> dict[str, Any] | None:
    """Remove the settings of the quantisation from a model's configuration, and return them; None without any.

    Raises
    ------
    InputError
        If weights in this format cannot be read.
    """
    found: dict[str, Any] | None = None
    for part in (config, config.get_text_config()):
        if settings := getattr(part, "quantization_config", None):
            found = dict(settings)
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    method = found and str(found.get("quant_method", "an unnamed method"))
    if method is not None and method not in FORMATS:
        raise InputError(
            f"{folder} contains quantised weights ({method})",
            hint="prune the unquantised original; or load it with transformers, call model.dequantize() and save it",
        )
    return found


class Dequantised(WeightSource):
    """Tensors of a quantised checkpoint, each dequantised by transformers when it is read.

    Parameters
    ----------
    folder : pathlib.Path
        The checkpoint, for errors and notes.
    source : SafetensorsWeights
        Its tensors.
    settings : dict
        ``quantization_config`` of the checkpoint.
    dtype : torch.dtype
        Precision of dequantised tensors.

    Raises
    ------
    InputError
        If scales are missing, or do not fit their weights.
    """

    #: What the names of quantised tensors and of their scales have after the model's name of the tensor.
    packed = ""
    scales = ""
    #: Precisions of both, as safetensors calls them.
    dtypes: tuple[frozenset[str], frozenset[str]]

    def __init__(self, folder: Path, source: SafetensorsWeights, settings: dict[str, Any], dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self.configure(settings)
        self._parts: dict[str, tuple[str, str]] = {}
        self._shapes = dict(source.shapes())
        for name in self._quantised():
            parts = name + self.packed, name + self.scales
            for part, allowed in zip(parts, self.dtypes, strict=True):
                held = source.dtypes.get(part)
                if held not in allowed:
                    what = "is missing" if held is None else f"is stored as {held}"
                    raise InputError(
                        f"{folder}: {name} has scales or is quantised, but {part} {what}", hint=_INCOMPLETE
                    )
            shape, scales = (self._shapes.pop(part) for part in parts)
            dense = self.dense(shape, scales)
            if dense is None:
                raise InputError(
                    f"{folder}: {parts[1]} of shape {list(scales)} does not fit {parts[0]} of shape {list(shape)}",
                    hint=_INCOMPLETE,
                )
            self._parts[name], self._shapes[name] = parts, dense
        method, precision = settings["quant_method"].upper(), str(dtype).removeprefix("torch.")
        note = f"the {method} weights of {folder} were dequantised to {precision}; what is saved is not quantised"
        #: What a user has to know about this.
        self.notes = (note,) if self._parts else ()

    def _quantised(self) -> list[str]:
        """Names, in the model, of the tensors that are quantised or have scales."""
        names = [name.removesuffix(self.scales) for name in self.source.dtypes if name.endswith(self.scales)]
        for name, dtype in self.source.dtypes.items():
            if name.endswith(self.packed) and dtype in self.dtypes[0] and not name.endswith(self.scales):
                names.append(name.removesuffix(self.packed))
        return list(dict.fromkeys(names))

    def configure(self, settings: dict[str, Any]) -> None:
        """Read what the format needs from ``quantization_config``."""
        del settings

    @abstractmethod
    def dense(self, packed: Shape, scales: Shape) -> Shape | None:
        """Shape of a tensor after dequantisation, by the shapes of its parts; None if they do not fit together."""

    @abstractmethod
    def dequantise(self, packed: Tensor, scales: Tensor) -> Tensor:
        """Dequantise a tensor."""

    def shapes(self) -> dict[str, Shape]:
        """See :class:`WeightSource`."""
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        """See :class:`WeightSource`."""
        if name not in self._parts:
            return self.source.tensor(name)
        packed, scales = map(self.source.tensor, self._parts[name])
        return self.dequantise(packed, scales)

    def prefetch(self, names: Iterable[str]) -> None:
        """See :class:`WeightSource`."""
        self.source.prefetch(part for name in names for part in self._parts.get(name, (name,)))


class Fp8Weights(Dequantised):
    """Weights in FP8 with one scale per block, or one per tensor."""

    scales = "_scale_inv"
    dtypes = frozenset({"F8_E4M3", "F8_E5M2"}), frozenset({"F32", "BF16", "F16", "F8_E8M0"})

    def configure(self, settings: dict[str, Any]) -> None:
        """See :class:`Dequantised`."""
        #: Rows and columns of a block; None if each tensor has one scale.
        self.block: Sequence[int] | None = FineGrainedFP8Config.from_dict(dict(settings)).weight_block_size

    def dense(self, packed: Shape, scales: Shape) -> Shape | None:
        """See :class:`Dequantised`."""
        if len(packed) < 2:
            return None
        if self.block is None:
            return packed if math.prod(scales) == 1 else None
        blocks = [-(-size // step) for size, step in zip(packed[-2:], self.block, strict=True)]
        return packed if scales == (*packed[:-2], *blocks) else None

    def dequantise(self, packed: Tensor, scales: Tensor) -> Tensor:
        """See :class:`Dequantised`."""
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        rows, columns = packed.shape[-2:]
        scales = scales.float()  # The result has their precision.
        if self.block is None:
            scales = scales.reshape(1, 1)
        else:
            # transformers derives the size of a block from the number of blocks. Where the last block is cut off, it
            # fails, or scales the wrong weights. Complete blocks leave no choice.
            whole = [blocks * step for blocks, step in zip(scales.shape[-2:], self.block, strict=True)]
            filled = packed.new_zeros(*packed.shape[:-2], *whole)
            filled[..., :rows, :columns] = packed
            packed = filled
        dense: Tensor = Fp8Dequantize(None).convert({"weight": packed, "weight_scale_inv": scales})["weight"]
        return dense[..., :rows, :columns].to(self.dtype)


class Mxfp4Weights(Dequantised):
    """Experts in MXFP4: two weights in a byte, and an exponent for each 32 of them."""

    packed, scales = "_blocks", "_scales"
    dtypes = frozenset({"U8"}), frozenset({"U8"})

    def dense(self, packed: Shape, scales: Shape) -> Shape | None:
        """See :class:`Dequantised`."""
        if len(packed) != 4 or packed[:-1] != scales or packed[-1] != 16:
            return None
        experts, rows, groups, size = packed
        return experts, 2 * groups * size, rows

    def dequantise(self, packed: Tensor, scales: Tensor) -> Tensor:
        """See :class:`Dequantised`."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        experts, rows, groups, size = packed.shape
        whole = torch.empty(experts, 2 * groups * size, rows, dtype=self.dtype)
        for expert in range(experts):  # transformers needs several times the memory of what it converts.
            part = slice(expert, expert + 1)
            whole[part] = convert_moe_packed_tensors(packed[part], scales[part], dtype=self.dtype)
        return whole


#: Formats that are read, by ``quant_method``.
FORMATS: dict[str, type[Dequantised]] = {"fp8": Fp8Weights, "mxfp4": Mxfp4Weights}
