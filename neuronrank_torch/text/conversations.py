"""Conversations, and the text that a model's chat template makes of them."""

from dataclasses import dataclass
from typing import Any

from neuronrank_core.errors import InputError, first_line

MESSAGES_HINT = '{"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Conversation:
    """A conversation, in the format of OpenAI and of the chat templates of transformers.

    Parameters
    ----------
    messages : list of dict
        With ``role`` and ``content``, which are strings; other keys are passed to the template.
    tools : list or None
        Descriptions of the tools that the assistant may call.
    where : str
        File and line, for errors.
    """

    messages: list[dict[str, Any]]
    tools: Any
    where: str

    @classmethod
    def of(cls, record: dict[str, Any], where: str) -> "Conversation":
        """The conversation in ``messages`` of a record; raises InputError if it is malformed."""
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise InputError(
                f"{where}: `messages` is not a list of messages", hint=f"it must look like {MESSAGES_HINT}"
            )
        numbered = enumerate(messages, start=1)
        return cls([_message(m, f"{where}, message {i}") for i, m in numbered], record.get("tools"), where)

    def text(self, tokenizer: Any) -> str:
        """The conversation in the chat template of a tokenizer.

        Raises
        ------
        InputError
            If the tokenizer has no template, or its template refuses the conversation.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError(
                f"{self.where}: `messages` need a chat template, which the tokenizer of this model does not have",
                hint='use the instruction-tuned model, or lines like {"text": "..."}',
            )
        try:
            text: str = tokenizer.apply_chat_template(self.messages, tools=self.tools, tokenize=False)
        except Exception as error:  # A template can raise anything.
            raise InputError(
                f"{self.where}: the chat template of the model refuses these messages: {first_line(error)}",
                hint="check the roles and their order",
            ) from error
        return text


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message whose content is a string: OpenAI also has lists of parts, and none beside calls of tools."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where}: no `role` with a string", hint=f"`messages` must look like {MESSAGES_HINT}")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise InputError(f"{where}: no `content` with a text", hint=f"`messages` must look like {MESSAGES_HINT}")
    return {**message, "content": content}
