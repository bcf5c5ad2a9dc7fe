"""Perplexity of a model in memory that is masked by one recipe after another."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neuronrank_core import Recipe
from neuronrank_torch.calibration.layerwise import split_output
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.evaluation.windows import Evaluated, score_windows
from neuronrank_torch.model.blocks import Block
from neuronrank_torch.model.early_stop import captured
from neuronrank_torch.model.structure import find_decoder, untied_head
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.prune import prune
from neuronrank_torch.text.sequences import Tokens

#: Fraction of the layers that the proxy uses, from the first.
_DEPTH = 0.25


class MaskedModel:
    """A model in memory that can be pruned and restored; its prunable weights are in memory twice.

    Where whole experts are removed, all of its weights are.

    Parameters
    ----------
    model, tokenizer
        As :func:`neuronrank_torch.model.open.load_model` gives them.
    statistics : StatisticsFolder
        Statistics to prune with.
    scope : Recipe
        Says which modules may be pruned.
    """

    def __init__(self, model: Any, tokenizer: Any, statistics: StatisticsFolder, scope: Recipe) -> None:
        self.model, self.tokenizer, self.statistics = model, tokenizer, statistics
        self.dense: list[tuple[Tensor, Tensor]] = []
        if scope.structured:
            return
        blocks: list[Block] = [untied_head(model)] if scope.prune_lm_head else []
        for layer in find_decoder(model).layers:
            blocks += [layer.mlp, *layer.blocks(include_attention=scope.include_attention)[1:]]
        self.dense = [(weight, weight.clone()) for block in blocks for weight in block.weights.values()]

    @contextmanager
    def masked(self, recipe: Recipe) -> Iterator[None]:
        """Context in which the model is pruned by a recipe."""
        whole = self.model
        if recipe.structured:
            self.model = copy.deepcopy(whole)
        try:
            prune(self.model, self.tokenizer, recipe, statistics=self.statistics)
            yield
        finally:
            self.model = whole
            with torch.no_grad():
                for weight, dense in self.dense:
                    weight.copy_(dense)

    def nll(
        self, windows: Tokens, batch_size: int, progress: Progress = silent, stage: str = "perplexity"
    ) -> list[float]:
        """Sum of -log p(token) of each window, of the model in its current state, dense or masked."""
        scores = score_windows([Evaluated(self.model, None, stage)], windows, batch_size=batch_size, progress=progress)
        return [window.nll[0] for window in scores]

    def early_output(self, windows: Tokens) -> Tensor:
        """Output of the first quarter of the layers on the first window, shape (tokens, hidden)."""
        layers = find_decoder(self.model).layers
        last = layers[max(1, round(_DEPTH * len(layers))) - 1].module

        def on_output(see: Callable[[Tensor], None]) -> RemovableHandle:
            return last.register_forward_hook(lambda layer, inputs, output: see(split_output(output)[0]))

        tokens = torch.from_numpy(windows[:1]).to(self.model.get_input_embeddings().weight.device)
        with torch.no_grad():
            return captured(on_output, partial(self.model, input_ids=tokens, use_cache=False))[0].float()


def output_error(output: Tensor, dense: Tensor) -> float:
    """Median over tokens of the squared error relative to the dense output.

    The mean would be dominated by the few tokens whose norm is larger by orders of magnitude.
    """
    squared = (output - dense).square().sum(-1) / dense.square().sum(-1)
    return float(squared.median())
