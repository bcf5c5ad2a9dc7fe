"""Text that a model writes: continuations of prompts, and answers in a conversation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from neuronrank_core.errors import InputError, InvalidValueError, NonFiniteError, first_line
from neuronrank_torch.model.limits import check_positions
from neuronrank_torch.model.quiet import quiet_transformers

#: Default prompts.
PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time, there was a")
#: Tokens of a sample.
SAMPLE_TOKENS = 40


@dataclass(frozen=True)
class Sample:
    """A prompt, and how it is continued with greedy decoding.

    Parameters
    ----------
    prompt : str
        The beginning of the text.
    before, after : str
        The continuation by the model before and after pruning.
    """

    prompt: str
    before: str
    after: str


def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, **how: Any) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Parameters
    ----------
    model, tokenizer : transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase
    prompts : sequence of str
    new_tokens : int
        Largest number of tokens; fewer if the model ends its text.
    temperature : float
        0 is greedy decoding; above, tokens are drawn from torch's global random state.

    Raises
    ------
    InvalidValueError
        If a prompt has no tokens, or the text would exceed the positions of the model.
    NonFiniteError
        If tokens are to be drawn and the model predicts NaN or Inf.
    """
    written = []
    for tokens in check_prompts(model, tokenizer, prompts, new_tokens):
        output = _generate(model, tokenizer, tokens, new_tokens, **how)
        # Decoded with the prompt, because a tokenizer may drop the space at the beginning of a text.
        before = tokenizer.decode(output[: tokens["input_ids"].shape[1]], skip_special_tokens=True)
        written.append(tokenizer.decode(output, skip_special_tokens=True)[len(before) :])
    return written


def check_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[Any]:
    """The tokens of each prompt; raises as :func:`continuations`, without generating anything."""
    tokenised = []
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidValueError("prompts", prompt, "text in UTF-8") from error
        tokens = tokenizer(prompt, return_tensors="pt", return_attention_mask=True)
        if not tokens["input_ids"].shape[1]:
            raise InvalidValueError("prompts", prompt, "a text that has tokens")
        check_positions(model, new_tokens, tokens["input_ids"].shape[1], "new_tokens")
        tokenised.append(tokens)
    return tokenised


def answer(model: Any, tokenizer: Any, messages: Sequence[Mapping[str, str]], new_tokens: int, **how: Any) -> str:
    """The model's next message in a conversation, by the chat template of its tokenizer.

    Parameters
    ----------
    messages : sequence of dict
        With ``role`` and ``content``.
    model, tokenizer, new_tokens, temperature
        As :func:`continuations`.

    Raises
    ------
    InputError
        If the template refuses the messages.
    InvalidValueError
        If the conversation would exceed the positions of the model.
    """
    try:
        tokens = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"return_attention_mask": True},
        )
    except Exception as error:  # A template can raise anything.
        raise InputError(
            f"the chat template of the model refuses the conversation: {first_line(error)}",
            hint="use a model whose template takes turns of user and assistant",
        ) from error
    check_positions(model, new_tokens, tokens["input_ids"].shape[1], "new_tokens")
    output = _generate(model, tokenizer, tokens, new_tokens, **how)[tokens["input_ids"].shape[1] :]
    return str(tokenizer.decode(output, skip_special_tokens=True))


def _generate(model: Any, tokenizer: Any, tokens: Any, new_tokens: int, *, temperature: float = 0.0) -> torch.Tensor:
    """The tokens of a prompt, with shape (1, tokens), and of its continuation."""
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with only_settings(model, **drawn, eos_token_id=model.generation_config.eos_token_id):
        output: torch.Tensor = model.generate(
            input_ids=tokens["input_ids"].to(model.device),
            attention_mask=tokens["attention_mask"].to(model.device),
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id,
        )[0]
    return output


@contextmanager
def only_settings(model: Any, **settings: Any) -> Iterator[None]:
    """Context for ``model.generate`` in which the model's own settings, such as penalties, do not apply.

    Tokens are drawn from the whole distribution.

    Raises
    ------
    NonFiniteError
        If tokens are to be drawn and the model predicts NaN or Inf.
    """
    own = model.generation_config
    # What is not set here would be filled from the model's own.
    whole = {"top_k": 0, "top_p": 1.0} if settings["do_sample"] else {}
    model.generation_config = GenerationConfig(**settings, **whole, use_cache=True)
    try:
        with quiet_transformers(), torch.inference_mode():
            yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NonFiniteError("the model predicts NaN or Inf", hint="try --dtype float32") from error
    finally:
        model.generation_config = own
