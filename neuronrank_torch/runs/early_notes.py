"""What a user has to know about a run before it begins."""

import math
from collections.abc import Iterator
from typing import Any

from neuronrank_core import Recipe
from neuronrank_core.effort import HELD_OUT
from neuronrank_core.statistics.table import SHARED_INPUT
from neuronrank_torch.evaluation.seen_text import evaluation_notes
from neuronrank_torch.model.structure import Decoder
from neuronrank_torch.pruning.scope import pruned_layers
from neuronrank_torch.pruning.sparsity_types import sparsity_type_of
from neuronrank_torch.pruning.whole_layers import held_out
from neuronrank_torch.runs.job import Inputs
from neuronrank_torch.text.sequences import CHARACTERS, tokenize


def early_notes(inputs: Inputs, text: str, eval_text: str, tokenizer: Any, decoder: Decoder) -> list[str]:
    """Notes on the texts of a run: on what is evaluated, and on whether there is enough to calibrate on."""
    return [
        *evaluation_notes(text, eval_text, inputs.statistics),
        *_repeated(inputs.recipe, text, tokenizer),
        *_underdetermined(inputs, decoder),
    ]


def _repeated(recipe: Recipe, text: str, tokenizer: Any) -> Iterator[str]:
    """Whether more tokens are drawn than the text has."""
    drawn = recipe.nsamples * recipe.seqlen
    if not text or len(text) > CHARACTERS * drawn:
        return
    there = tokenize(tokenizer, text).size
    if drawn > there:
        yield (
            f"{recipe.nsamples} sequences of {recipe.seqlen} tokens are drawn from a text of {there:,} tokens, so they"
            f" overlap: --nsamples {max(1, there // recipe.seqlen)} covers it once"
        )


def _underdetermined(inputs: Inputs, decoder: Decoder) -> Iterator[str]:
    """Whether the update has fewer tokens than inputs to fit."""
    recipe = inputs.recipe
    if not (inputs.documents or inputs.writes_text) or recipe.update == "none":
        return
    what, part, tokens = "inputs", 1.0, recipe.nsamples * recipe.seqlen
    if recipe.removes_layers:
        what, part, tokens = "outputs", 1 - HELD_OUT, tokens - held_out(recipe.nsamples, recipe.seqlen) * recipe.seqlen
        widths = {mlp.weights["down_proj"].shape[0]: "down_proj" for layer in decoder.layers for mlp in layer.mlps}
    else:
        kind = sparsity_type_of(recipe)
        read = {role for stage in kind.stages(recipe) for role in stage}
        blocks = [block for layer in pruned_layers(decoder, recipe)[0] for block in kind.blocks(layer, recipe)]
        inputs_of = [(role, weight) for block in blocks for role, weight in block.weights.items()]
        widths = {weight.shape[1]: role for role, weight in inputs_of if SHARED_INPUT.get(role, role) in read}
    if widths and tokens < max(widths):
        enough = math.ceil(-(-max(widths) // recipe.seqlen) / part)
        yield (
            f"--update {recipe.update} fits the {max(widths):,} {what} of {widths[max(widths)]} on {tokens:,} tokens:"
            f" use --nsamples {enough} or more"
        )
