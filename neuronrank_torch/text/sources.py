"""Reads text for calibration and evaluation: from Python's documentation, a file or the datasets hub."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from neuronrank_core.errors import InputError
from neuronrank_torch.hub import hub_reason, quiet_hub
from neuronrank_torch.paths import local_path
from neuronrank_torch.text.conversations import MESSAGES_HINT, Conversation

Split = Literal["calibration", "evaluation"]
#: The name of the text that the model writes itself, and of the file that keeps it in the output.
SELF, SELF_FILE = "self", "calibration.jsonl"
#: Separator between documents, as in the published WikiText perplexities.
_SEPARATOR = "\n\n"
#: Every fourth topic of the built-in text is for evaluation, the others are for calibration.
_EVALUATION_STRIDE = 4
#: Files that would be read with all their punctuation.
_TABLES = {".json", ".csv", ".parquet"}
_JSONL_HINT = f'each line must look like {{"text": "..."}} or {MESSAGES_HINT}'
#: What to do with files that are no texts.
_NO_TEXTS = {
    **dict.fromkeys(_TABLES, f"convert it to .jsonl: {_JSONL_HINT}"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), "unpack it first"),
}
#: Names that end like this are paths, even if there is no such file.
_FILE_SUFFIXES = {".txt", ".text", ".md", ".jsonl", *_NO_TEXTS}
_HUB_HINT = "convert it to .jsonl with a `text` or `messages` field"
#: JSON can have the escape of one without the other, which no tokenizer takes.
_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_SPLITS: dict[Split, str] = {"calibration": "train", "evaluation": "test"}


@dataclass(frozen=True)
class Documents:
    """What a ``--dataset`` or ``--eval-dataset`` value refers to.

    Parameters
    ----------
    spec : str
        The value.
    items : tuple of str or Conversation
    """

    spec: str
    items: tuple[str | Conversation, ...]

    @property
    def texts(self) -> list[str]:
        """The documents that are texts."""
        return [item for item in self.items if isinstance(item, str)]

    def text(self, tokenizer: Any = None) -> str:
        """The documents as one text, separated by blank lines; conversations in the chat template of the tokenizer.

        Parameters
        ----------
        tokenizer : transformers.PreTrainedTokenizerBase, optional
            Needed for conversations only.

        Raises
        ------
        InputError
            If there is no text, or a conversation cannot be put in the template.
        """
        text = _SEPARATOR.join(item if isinstance(item, str) else item.text(tokenizer) for item in self.items)
        if not text.strip():
            raise InputError(f"{self.spec} contains no text", hint="choose another file or dataset")
        return text


def read_documents(spec: str, split: Split) -> Documents:
    """Read what a ``--dataset`` or ``--eval-dataset`` value refers to; see :func:`load_text`."""
    documents = Documents(spec, tuple(_documents(spec, split)))
    if not any(isinstance(item, Conversation) for item in documents.items):
        documents.text()  # An empty text is reported before a model is loaded.
    return documents


def load_text(spec: str, split: Split, tokenizer: Any = None) -> str:
    """Read the text that a ``--dataset`` or ``--eval-dataset`` value refers to.

    Parameters
    ----------
    spec : str
        ``builtin``, the English reference text that ships with Python; the path of a ``.jsonl`` file (one object per
        line, with a text in ``text`` or a conversation in ``messages``) or of a UTF-8 text file; otherwise a hub
        dataset ``name[:config[:split]]``.
    split : {"calibration", "evaluation"}
        Which part of ``builtin``, or which default split of a hub dataset (``train``, ``test``). The parts of
        ``builtin`` are disjoint. A file is read as a whole.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Its chat template turns conversations into text.

    Returns
    -------
    str
        Not empty. Documents are separated by a blank line.

    Raises
    ------
    InputError
        If the file or dataset does not exist, or contains no readable text.
    """
    return read_documents(spec, split).text(tokenizer)


def text_fingerprint(text: str) -> str:
    """SHA-256 of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _documents(spec: str, split: Split) -> Iterable[str | Conversation]:
    if spec == SELF:
        raise InputError(
            "`self` is a calibration text for `prune` and `collect` only",
            hint=f"give the {SELF_FILE} of their output; ./{SELF} is the file of this name",
        )
    if spec == "builtin":
        return _builtin_documents(split)
    path = local_path(spec)
    if path.is_dir():
        raise InputError(f"{spec} is a folder", hint="give the path of a .txt or .jsonl file")
    if path.exists():
        if hint := _NO_TEXTS.get(path.suffix.lower()):
            raise InputError(f"{spec} is not a text", hint=hint)
        return _jsonl_documents(path) if path.suffix.lower() == ".jsonl" else [_read_utf8(path)]
    if is_path(spec):
        raise InputError(f"file not found: {spec}", hint="check the path, or use `builtin`")
    return _hub_documents(spec, split)


def is_path(spec: str, flavour: type[PurePath] = PurePath) -> bool:
    """Whether a text's name looks like a path rather than a name on the hub; ``flavour`` defines the path syntax."""
    path = flavour(spec)
    return spec.startswith((".", "~")) or bool(path.anchor) or path.suffix.lower() in _FILE_SUFFIXES


def _builtin_documents(split: Split) -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # Some distributions package Python's documentation data separately.
        raise InputError(
            "this Python installation lacks pydoc_data, the source of the built-in text", hint="use a text file instead"
        ) from error
    for index, name in enumerate(sorted(topics)):
        if (index % _EVALUATION_STRIDE == 0) == (split == "evaluation"):
            yield topics[name]


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # With or without a byte-order mark.
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start})", hint="convert it: iconv -f CURRENT_ENCODING -t utf-8"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from error


def _jsonl_documents(path: Path) -> Iterator[str | Conversation]:
    # Not splitlines(): JSON strings may contain U+2028 and similar, which do not end a line of a .jsonl file.
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # Too many digits, or too deep.
            raise InputError(f"{path}, line {number}: not JSON ({error})", hint=_JSONL_HINT) from error
        if "\\u" in line and _SURROGATE.search(json.dumps(record, ensure_ascii=False)):
            raise InputError(
                f"{path}, line {number}: half of a character (a surrogate without its pair)",
                hint="the text was cut within an emoji or a similar character: remove what is left of it",
            )
        record = record if isinstance(record, dict) else {}
        if isinstance(record.get("text"), str):
            yield record["text"]
        elif "messages" in record:
            yield Conversation.of(record, f"{path}, line {number}")
        else:
            raise InputError(
                f"{path}, line {number}: no `text` field with a string, and no `messages`", hint=_JSONL_HINT
            )


def _hub_documents(spec: str, split: Split) -> Iterator[str | Conversation]:
    name, _, rest = spec.partition(":")
    config, _, named_split = rest.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{spec} is not a local file, and downloading it requires the `datasets` package",
            hint="pip install 'neuronrank[hub]'",
        ) from error
    try:
        with quiet_hub():
            rows = datasets.load_dataset(name, config or None, split=named_split or _HUB_SPLITS[split])
    except Exception as error:  # The package has no common base class for its errors.
        raise InputError(
            f"{spec} is not a local file and could not be downloaded: {hub_reason(error)}",
            hint="check the path or the name: name[:config[:split]]",
        ) from error
    if "text" in rows.column_names:
        for number, text in enumerate(rows["text"], start=1):
            if not isinstance(text, str):
                raise InputError(f"{spec}, row {number}: `text` is {text!r}, not a string", hint=_HUB_HINT)
            yield text
    elif "messages" in rows.column_names:
        for number, messages in enumerate(rows["messages"], start=1):
            yield Conversation.of({"messages": messages}, f"{spec}, row {number}")
    else:
        columns = ", ".join(rows.column_names)
        raise InputError(f"{spec} has no `text` column, only: {columns}", hint=_HUB_HINT)
