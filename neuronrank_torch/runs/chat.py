"""A conversation with one model, or with two side by side: what ``neuronrank chat`` calls."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from neuronrank_core import InvalidValueError
from neuronrank_torch.evaluation.generation import answer, continuations
from neuronrank_torch.model.open import Dtype, load_model
from neuronrank_torch.progress import Progress, silent


@dataclass(frozen=True)
class Turn:
    """A prompt, and what each model makes of it.

    Parameters
    ----------
    prompt : str
        What the models answer or continue.
    answers : tuple of str
        One for each model.
    """

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class ChatResult:
    """Result of ``neuronrank chat``.

    Parameters
    ----------
    models : tuple of str
        The models, as they were named.
    turns : tuple of Turn
        In the order of the prompts.
    notes : tuple of str
        Warnings.
    schema : int
        Version of this format.
    """

    models: tuple[str, ...]
    turns: tuple[Turn, ...]
    notes: tuple[str, ...] = ()
    schema: int = 1


@dataclass
class _Speaker:
    """A loaded model with its own side of the conversation, if it has a chat template."""

    model: Any
    tokenizer: Any
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def converses(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def reply(self, prompt: str, new_tokens: int, temperature: float) -> str:
        how: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature}
        if not self.converses:
            return continuations(self.model, self.tokenizer, [prompt], **how)[0]
        asked = [*self.messages, {"role": "user", "content": prompt}]
        said = answer(self.model, self.tokenizer, asked, **how)
        self.messages = [*asked, {"role": "assistant", "content": said}]
        return said


class Chat:
    """Models that answer the same prompts.

    A model whose tokenizer has a chat template answers and remembers the conversation, with its own answers in it. Any
    other continues each prompt by itself. All models are in memory.

    Parameters
    ----------
    models : tuple of str
        As :func:`neuronrank_torch.model.open.load_model` takes them.
    new_tokens : int
        Largest number of tokens of an answer.
    temperature : float
        0 is greedy decoding; above, tokens are drawn at random.
    seed : int
        Of the random numbers. The turns of a conversation have different ones, the models the same.
    device, dtype
        As in :class:`neuronrank_torch.runs.job.Job`.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Raises
    ------
    NeuronRankError
        If a model cannot be loaded.
    """

    def __init__(
        self,
        models: tuple[str, ...],
        *,
        new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        device: str = "auto",
        dtype: Dtype = "auto",
        progress: Progress = silent,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise InvalidValueError("temperature", temperature, "[0, inf)")
        self.models, self.new_tokens, self.temperature, self.seed = models, new_tokens, temperature, seed
        self.speakers: list[_Speaker] = []
        notes: list[str] = []
        for done, name in enumerate(models):
            progress(f"loading {name}", done, len(models), "models")
            model, tokenizer, source = load_model(name, dtype=dtype, device=device)
            speaker = _Speaker(model, tokenizer)
            self.speakers.append(speaker)
            notes += source.notes
            if not speaker.converses:
                notes.append(f"{name} has no chat template: it continues each prompt, without the earlier ones")
        self.notes = tuple(notes)

    def turns(self, prompts: Iterable[str]) -> Iterator[Turn]:
        """Answer each prompt.

        Raises
        ------
        NeuronRankError
            If a prompt has no tokens, or the conversation exceeds the positions of a model.
        """
        for number, prompt in enumerate(prompts):
            answers = []
            for speaker in self.speakers:
                with torch.random.fork_rng():
                    torch.manual_seed((self.seed + number) % 2**63)
                    answers.append(speaker.reply(prompt, self.new_tokens, self.temperature))
            yield Turn(prompt, tuple(answers))
