"""A streamed model is opened once more as it was, whatever was done to it and to earlier ones."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from pruning import TEXT, recipe
from tiny import Family, tiny_model, tiny_tokenizer

from neuronrank_torch import prune
from neuronrank_torch.model.open import load_model, open_model
from neuronrank_torch.model.streaming import HEAD, REST, StreamedModel
from neuronrank_torch.runs.choice import Rehearsal

TOKENS = torch.arange(12).reshape(2, 6)


def widths(model: StreamedModel) -> list[int]:
    """Inputs of each ``down_proj``, as its module says; the tensors themselves come from the source."""
    return [layer.mlps[0].projections["down_proj"].module.in_features for layer in model.decoder.layers]


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma3", True), ("granite", True)])
def test_a_reopened_model_has_the_weights_of_the_source(tmp_path: Path, family: Family, tied: bool) -> None:
    tiny_model(family, layers=2, tied=tied).save_pretrained(tmp_path)
    tiny_tokenizer(True).save_pretrained(tmp_path)
    model, tokenizer, _ = open_model(str(tmp_path))
    whole, units, reopen = load_model(str(tmp_path))[0], model.units, model.reopener()
    for _ in range(3):
        assert widths(model) == [128, 128]
        prune(model.model, tokenizer, recipe(sparsity_type="neurons"), TEXT, store=Rehearsal(model))
        assert widths(model) == [64, 64]
        model.tensors(REST)[units[REST][0]].zero_()
        model = reopen()
        assert model.units == units
        for unit in model.units:
            with nullcontext() if unit == REST else model.resident(unit):
                tensors = model.tensors(unit)
                assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in tensors.items())
        with torch.no_grad(), model.resident(0), model.resident(1), model.resident(HEAD):
            assert torch.equal(model.model(TOKENS).logits, whole(TOKENS).logits)
