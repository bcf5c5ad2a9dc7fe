"""The attention of a layer as heads that can be removed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuronrank_torch.model.blocks import Block, select_entries


@dataclass(frozen=True, eq=False)
class Attention(Block):
    """Attention whose heads are equally many rows of ``q_proj`` each, and columns of ``o_proj``.

    Heads that share rows of ``k_proj`` and ``v_proj`` are a group.
    """

    @property
    def head_dim(self) -> int:
        """Number of outputs of a head; 0 if the module does not say."""
        size = getattr(self.module, "head_dim", 0)
        return size if isinstance(size, int) else 0

    @property
    def groups(self) -> int:
        """Number of key-value heads."""
        return int(self.projections["k_proj"].weight.shape[0]) // max(self.head_dim, 1)

    @property
    def heads(self) -> int | None:
        """Number of query heads; None if the matrices are not made of heads of that size, or something joins heads."""
        rows = {role: projection.weight.shape[0] for role, projection in self.projections.items()}
        size, width = self.head_dim, self.projections["o_proj"].weight.shape[1]
        if not size or rows["q_proj"] != width or width % size or rows["k_proj"] % size or width % rows["k_proj"]:
            return None
        own = {id(projection.module) for projection in self.projections.values()}
        inner = [p for m in self.module.modules() if id(m) not in own for p in m.parameters(recurse=False)]
        joint = {width, rows["k_proj"]} - {size}
        if rows["v_proj"] != rows["k_proj"] or any(joint & set(parameter.shape) for parameter in inner):
            return None
        per_head = (width // size,)
        if any("sink" not in name or p.shape != per_head for name, p in self.module.named_parameters(recurse=False)):
            return None
        return int(width // size)

    def remove_heads(self, kept: Tensor) -> None:
        """Remove all other heads, and the groups of which none is left.

        Parameters
        ----------
        kept : int64 Tensor, shape (kept,)
            Indices of the heads to keep, ascending; as many of each group that stays.
        """
        heads, groups = self.heads, self.groups
        assert heads is not None
        by_role = {"q_proj": kept, **dict.fromkeys(("k_proj", "v_proj"), torch.unique(kept // (heads // groups)))}
        for role, those in by_role.items():
            module: Any = self.projections[role].module
            rows = self.features(those)
            for name, _ in list(module.named_parameters(recurse=False)):
                select_entries(module, name, 0, rows)
            module.out_features = len(rows)
        output: Any = self.projections["o_proj"].module
        select_entries(output, "weight", 1, self.features(kept))
        output.in_features = len(self.features(kept))
        for name, parameter in list(self.module.named_parameters(recurse=False)):
            if parameter.shape == (heads,):  # Sinks
                select_entries(self.module, name, 0, kept)
        self.count_heads()

    def features(self, heads: Tensor) -> Tensor:
        """Indices of the outputs of heads, shape (heads * head_dim,)."""
        return (heads[:, None] * self.head_dim + torch.arange(self.head_dim, device=heads.device)).flatten()

    def count_heads(self) -> None:
        """Set the numbers that the module holds to those of its matrices."""
        heads, groups = self.heads or 0, self.groups
        names = {"num_heads": heads, "num_attention_heads": heads, "n_heads": heads}
        names |= {"num_key_value_heads": groups, "num_kv_heads": groups, "num_key_value_groups": heads // groups}
        for name, number in names.items():
            if isinstance(getattr(self.module, name, None), int):
                setattr(self.module, name, number)
