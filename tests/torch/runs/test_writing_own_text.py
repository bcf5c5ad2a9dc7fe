"""Text that a model writes itself, against a loop without a cache that samples from the whole distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BOS, EOS, tiny_model, tiny_tokenizer

from neuronrank_core import InputError, InvalidValueError, NonFiniteError, Recipe
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.own_text import first_token, sample, write_text


def silent(*step: object) -> None:
    del step


def by_hand(model: Any, first: int, shape: tuple[int, int], seed: int, batch_size: int) -> list[list[int]]:
    """Sample by the chain rule, with a forward pass over all tokens so far for each new one."""
    rows: list[list[int]] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        while len(rows) < shape[0]:
            tokens = torch.full((min(batch_size, shape[0] - len(rows)), 1), first)
            while tokens.shape[1] < shape[1]:
                chances = torch.exp(torch.log_softmax(model(tokens, use_cache=False).logits[:, -1].double(), -1))
                tokens = torch.cat([tokens, torch.multinomial(chances.float(), 1)], 1)
            rows += tokens.tolist()
    return rows


def test_samples_at_temperature_one_whatever_the_model_prefers():
    model = tiny_model(layers=2, hidden=32, intermediate=56)
    own = model.generation_config
    own.update(do_sample=True, temperature=0.2, top_k=3, top_p=0.5, repetition_penalty=2.0, eos_token_id=[EOS, 9])
    own.suppress_tokens, own.max_new_tokens, own.min_new_tokens = [5, 6], 3, 2
    state = torch.get_rng_state()
    tokens = sample(model, BOS, Recipe(nsamples=5, seqlen=24, seed=3), 2, silent)
    assert [row.tolist() for row in tokens] == by_hand(model, BOS, (5, 24), 3, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own


def test_goes_on_after_the_end_of_a_text_and_the_seed_decides():
    model = tiny_model(layers=2, hidden=32, intermediate=56)
    one, same, other = (sample(model, BOS, Recipe(nsamples=16, seqlen=128, seed=s), 16, silent) for s in (1, 1, 2))
    assert torch.equal(torch.stack(one), torch.stack(same))
    assert not torch.equal(torch.stack(one), torch.stack(other))
    assert all(row.shape == (128,) for row in one)
    ends = [row.tolist().index(EOS) for row in one if EOS in row[:-2]]
    assert ends, "no sequence ends early: this test shows nothing"
    assert any(len(set(one[i].tolist()[ends[0] + 1 :])) > 1 for i in range(16))


def test_documents_can_be_encoded_again_and_progress_is_told():
    tokenizer = tiny_tokenizer(True)
    model = tiny_model(layers=1, hidden=32, intermediate=56)
    steps: list[tuple[Any, ...]] = []
    recipe = Recipe(nsamples=3, seqlen=6)
    texts = write_text(Job("unused", batch_size=2), recipe, lambda *step: steps.append(step), model, tokenizer)
    assert len(texts) == 3
    assert all(text.startswith("<s>") for text in texts)
    assert tokenizer(texts[0], add_special_tokens=False)["input_ids"][0] == BOS
    assert {step[0::2] for step in steps} == {("writing the calibration text", 18)}
    assert [step[1] for step in steps] == [4, 6, 8, 10, 12, 14, 15, 16, 17, 18]


@pytest.mark.parametrize(("bos", "eos", "first"), [("<s>", "</s>", BOS), (None, "</s>", EOS)])
def test_begins_with_bos_or_else_eos(bos, eos, first):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    assert first_token(tokenizer) == first


def test_no_token_to_begin_with():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a beginning-of-sequence nor an end-of-sequence"):
        first_token(tokenizer)


def test_longer_than_the_model_has_positions():
    with pytest.raises(InvalidValueError, match="seqlen"):
        write_text(Job("unused"), Recipe(seqlen=513), silent, tiny_model(layers=1), tiny_tokenizer())


def test_nan():
    model = tiny_model(layers=1, hidden=32, intermediate=56, tied=False)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        sample(model, BOS, Recipe(nsamples=1, seqlen=4), 1, silent)
