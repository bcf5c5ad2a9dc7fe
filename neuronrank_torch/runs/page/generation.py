"""Greedy continuations of prompts."""

from collections.abc import Sequence
from typing import Any

import torch

from neuronrank_core import InvalidValueError
from neuronrank_torch.model.limits import check_positions
from neuronrank_torch.model.quiet import quiet_transformers

#: Default prompts.
PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time, there was a")


def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
    prompts : sequence of str
    new_tokens : int
        Largest number of tokens; fewer if the model ends its text.

    Raises
    ------
    InvalidValueError
        If a prompt has no tokens, or the text would exceed the positions of the model.
    """
    written = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
        length = tokens["input_ids"].shape[1]
        if not length:
            raise InvalidValueError("prompts", prompt, "a text that has tokens")
        check_positions(model, new_tokens, length, "new_tokens")
        with quiet_transformers(), torch.inference_mode():
            output = model.generate(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )[0]
        before = tokenizer.decode(output[:length], skip_special_tokens=True)
        written.append(tokenizer.decode(output, skip_special_tokens=True)[len(before) :])
    return written
