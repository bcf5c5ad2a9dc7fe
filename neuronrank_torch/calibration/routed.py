"""Sums over the tokens that are routed to each expert, by which the experts are fitted, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuronrank_core.update.few_tokens import shrunk_gram, shrunk_target
from neuronrank_torch.calibration.gram import add_gram, complete
from neuronrank_torch.distributed.ranks import Ranks
from neuronrank_torch.model.blocks import Mlp, by_input
from neuronrank_torch.model.experts import Experts

#: Tokens of an expert that are computed together.
_TOKENS = 4096


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens of one expert; see :class:`neuronrank_torch.calibration.gram.Sums`."""

    gram: dict[str, Tensor]
    target: Tensor | None = None


class RoutedTokens(ExitStack):
    """Keeps what the experts of a layer get while all text runs through it once; a context manager.

    The inputs of a layer are kept once, in the order of the tokens, however many experts a token has. The sums of an
    expert are computed from them when they are asked for, so those of one expert are in memory at a time.

    Parameters
    ----------
    experts : Experts
    inputs : Tensor, shape (sequences, seqlen, hidden_size)
        Where the inputs are kept.
    """

    def __init__(self, experts: Experts, inputs: Tensor) -> None:
        super().__init__()
        self.experts, self._inputs = experts, inputs.flatten(0, 1)
        self._chosen: list[Tensor] = []
        self._seen = 0

    def __enter__(self) -> RoutedTokens:
        self.callback(self.experts.on_tokens(self._keep).remove)
        return self

    def _keep(self, inputs: Tensor, chosen: Tensor, factors: Tensor) -> None:
        del factors
        self._inputs[self._seen : self._seen + len(inputs)].copy_(inputs)
        self._seen += len(inputs)
        self._chosen.append(chosen)

    def sums(self, block: Mlp, roles: Sequence[str], ranks: Ranks, dense: Experts | None = None) -> ExpertSums:
        """Sums over the tokens of an expert.

        Parameters
        ----------
        block : Mlp
            The expert.
        roles : sequence of str
            Names of the inputs.
        ranks : Ranks
            Processes that share the text.
        dense : Experts, optional
            The experts before pruning. If given, the target of ``down_proj`` is what they put out.

        Raises
        ------
        NonFiniteError
            On NaN or Inf.
        """
        assert block.expert is not None
        own = {role: p for role, p in by_input(block.projections).items() if role in roles}
        sums = {
            role: _zeros(p.weight, p.weight.shape[1] + (p.bias is not None), square=True) for role, p in own.items()
        }
        down, tokens = block.projections["down_proj"], 0
        target = _zeros(down.weight, sums["down_proj"].shape[1]) if dense is not None and "down_proj" in own else None
        for x in self._tokens_of(block.expert):
            tokens += len(x)
            product = self.experts.activations(block.expert, x)[1] if "down_proj" in own else x
            for role, projection in own.items():
                rows = (product if role == "down_proj" else x).float()
                rows = rows if projection.bias is None else pad(rows, (0, 1), value=1.0)
                add_gram(sums[role], rows)
                if role == "down_proj" and target is not None and dense is not None:
                    wanted = dense.outputs(block.expert, dense.activations(block.expert, x)[1])
                    target.addmm_(wanted.float().T, rows)
        return self._shrunk(block, sums, target, tokens, ranks, dense)

    def _shrunk(
        self,
        block: Mlp,
        sums: dict[str, Tensor],
        target: Tensor | None,
        tokens: int,
        ranks: Ranks,
        dense: Experts | None,
    ) -> ExpertSums:
        """The sums of all ranks, shrunk by their number of tokens."""
        sums = complete(sums, ranks, [block])
        tokens = sum(ranks.union([tokens]))
        if target is not None and dense is not None:
            assert block.expert is not None
            down = dense.projections_of(block.expert)["down_proj"]
            whole = down.with_bias(down.weight.float())
            target = shrunk_target(ranks.sum_in_order(target), whole, sums["down_proj"], tokens)
        return ExpertSums({role: shrunk_gram(gram, tokens) for role, gram in sums.items()}, target)

    def _tokens_of(self, expert: int) -> Iterator[Tensor]:
        """The inputs of an expert, in the order of its tokens."""
        if not self._chosen:  # A rank without text.
            return
        self._chosen = [torch.cat(self._chosen)]
        [own] = torch.nonzero((self._chosen[0] == expert).any(dim=-1), as_tuple=True)
        device = self.experts.module.down_proj.device
        for some in torch.split(own, _TOKENS):
            yield self._inputs[some.to(self._inputs.device)].to(device)


def _zeros(weight: Tensor, columns: int, *, square: bool = False) -> Tensor:
    return weight.new_zeros(columns if square else len(weight), columns, dtype=torch.float32)


class SquaredFactors(ExitStack):
    """Sums the squares of the factors of the experts' outputs while text runs through a layer; a context manager.

    Parameters
    ----------
    experts : Experts, optional
        None if the layer has none.
    """

    def __init__(self, experts: Experts | None) -> None:
        super().__init__()
        self.experts = experts
        self._sums, self._tokens = torch.zeros(experts.count if experts else 0, dtype=torch.float64), 0

    def __enter__(self) -> SquaredFactors:
        if self.experts is not None:
            self.callback(self.experts.on_tokens(self._see).remove)
        return self

    def _see(self, inputs: Tensor, chosen: Tensor, factors: Tensor) -> None:
        self._tokens += len(inputs)
        self._sums.index_add_(0, chosen.flatten().cpu(), factors.flatten().double().square().cpu())

    def mean(self, ranks: Ranks) -> list[float]:
        """The mean over all tokens of all ranks, for each expert; 0 for one that gets no tokens."""
        sums, tokens = zip(*ranks.union([(self._sums, self._tokens)]), strict=True)
        return [float(total) for total in sum(sums) / max(1, sum(tokens))]
