"""What a user has to know about a run before it begins."""

from collections.abc import Iterator
from typing import Any

from neuronrank_core import Recipe
from neuronrank_torch.evaluation.seen_text import evaluation_notes
from neuronrank_torch.model.structure import Decoder
from neuronrank_torch.pruning.scope import pruned_layers
from neuronrank_torch.runs.job import Inputs
from neuronrank_torch.text.sequences import tokenize

#: More characters per token than any tokenizer has on average: a text this much longer need not be tokenised.
_CHARACTERS = 16


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
    if not text or len(text) > _CHARACTERS * drawn:
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
    layers, _ = pruned_layers(decoder, recipe)
    blocks = [block for layer in layers for block in layer.blocks(include_attention=recipe.include_attention)]
    widths = {block.weights[role].shape[1]: role for block in blocks for role in block.weights}
    tokens = recipe.nsamples * recipe.seqlen
    if widths and tokens < max(widths):
        yield (
            f"--update {recipe.update} fits the {max(widths):,} inputs of {widths[max(widths)]} on {tokens:,} tokens:"
            f" use --nsamples {-(-max(widths) // recipe.seqlen)} or more"
        )
