"""Collects the statistics of a layer's experts: a table each, of the tokens that are routed to it and no others."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from neuronrank_core import LayerStatistics, Recipe
from neuronrank_core.errors import MissingStatisticsError
from neuronrank_torch.calibration.collector import LayerCollector
from neuronrank_torch.distributed.ranks import ALONE, Ranks
from neuronrank_torch.model.experts import Experts, routing, tokens_of


class ExpertCollector:
    """Watches the experts of a layer while micro-batches run through it; the counterpart of :class:`LayerCollector`.

    The experts' module computes all of them in one go, so that there is nothing to hook inside. Each expert's gate and
    up are therefore computed once more, document by document, for a collector of its own to see.

    Parameters
    ----------
    index : int
        The layer's number, named in errors.
    experts : Experts
    recipe : Recipe
        Says which statistics are needed, of which signal.
    """

    def __init__(self, index: int, experts: Experts, recipe: Recipe) -> None:
        self.index, self.experts = index, experts
        self._mlps: list[dict[str, nn.Module]] = []
        self._collectors: list[LayerCollector] = []
        for expert in range(len(experts)):
            # What down makes of the product is not looked at.
            mlp = {**experts.linears(expert), "down_proj": nn.Identity()}
            self._mlps.append(mlp)
            self._collectors.append(LayerCollector(where(index, expert), mlp, experts.activation, recipe))
        self._tokens = [0] * len(experts)
        self._seen: tuple[Tensor, Tensor] | None = None
        self._open = ExitStack()

    def __enter__(self) -> ExpertCollector:
        for collector in self._collectors:
            self._open.enter_context(collector)
        hook = self.experts.module.register_forward_pre_hook(self._hook, with_kwargs=True)
        self._open.callback(hook.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        self._seen = routing(args, kwargs)

    def add_documents(self, first: int, tokens: int) -> None:
        """Turn what the experts were given since the last call into rows.

        Parameters
        ----------
        first : int
            Number of the micro-batch's first document; the others follow.
        tokens : int
            Length of each document.

        Raises
        ------
        MissingStatisticsError
            If the layer did not call its experts.
        NonFiniteError
            If a statistic is NaN or Inf.
        """
        if self._seen is None:
            raise MissingStatisticsError(self.index, f"{type(self.experts.module).__name__} was not called")
        (hidden, chosen), self._seen = self._seen, None
        documents = hidden.reshape(-1, tokens, hidden.shape[-1])
        for expert in range(len(self.experts)):
            for document, positions in enumerate(tokens_of(chosen, expert, tokens)):
                if len(positions):
                    self._add(expert, first + document, documents[document, positions])

    def _add(self, expert: int, document: int, x: Tensor) -> None:
        """Show an expert's collector the tokens of a document, shape (tokens, hidden_size)."""
        mlp = self._mlps[expert]
        mlp["down_proj"](self.experts.activation(mlp["gate_proj"](x[None])) * mlp["up_proj"](x[None]))
        self._collectors[expert].add_documents(document, len(x))
        self._tokens[expert] += len(x)

    def statistics(self, expert: int, ranks: Ranks = ALONE) -> LayerStatistics | None:
        """The table of an expert, with a row for each document of any rank that has tokens for it; None if none has."""
        tokens = sum(ranks.union([self._tokens[expert]]))
        return self._collectors[expert].statistics(ranks) if tokens else None


def where(index: int, expert: int) -> str:
    """How an error names an expert."""
    return f"{index} expert {expert}"
