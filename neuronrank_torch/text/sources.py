"""Reads text for calibration and evaluation: from Python's documentation, a file or the datasets hub."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Literal

from neuronrank_core.errors import InputError
from neuronrank_torch.hub import hub_reason, quiet_hub

Split = Literal["calibration", "evaluation"]
#: Separator between documents, as in the published WikiText perplexities.
_SEPARATOR = "\n\n"
#: Every fourth topic of the built-in text is for evaluation, the others are for calibration.
_EVALUATION_STRIDE = 4
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".parquet"}
_JSONL_HINT = 'each line must look like {"text": "..."}'
_HUB_SPLITS: dict[Split, str] = {"calibration": "train", "evaluation": "test"}


def load_text(spec: str, split: Split) -> str:
    """Read the text that a ``--dataset`` or ``--eval-dataset`` value refers to.

    Parameters
    ----------
    spec : str
        ``builtin``, the English reference text that ships with Python; the path of a ``.jsonl`` file (one object per
        line, with the text in ``text``) or of a UTF-8 text file; otherwise a hub dataset ``name[:config[:split]]``.
    split : {"calibration", "evaluation"}
        Which part of ``builtin``, or which default split of a hub dataset (``train``, ``test``). The parts of
        ``builtin`` are disjoint. A file is read as a whole.

    Returns
    -------
    str
        Not empty. Documents are separated by a blank line.

    Raises
    ------
    InputError
        If the file or dataset does not exist, or contains no readable text.
    """
    text = _SEPARATOR.join(_documents(spec, split))
    if not text.strip():
        raise InputError(f"{spec} contains no text", hint="choose another file or dataset")
    return text


def text_fingerprint(text: str) -> str:
    """SHA-256 of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _documents(spec: str, split: Split) -> Iterator[str]:
    if spec == "builtin":
        return _builtin_documents(split)
    try:
        path = Path(spec).expanduser()
    except RuntimeError as error:
        raise InputError(f"file not found: {spec} ({error})", hint="check the path") from error
    if path.is_dir():
        raise InputError(f"{spec} is a folder", hint="give the path of a .txt or .jsonl file")
    if path.exists():
        return _jsonl_documents(path) if path.suffix.lower() == ".jsonl" else iter([_read_utf8(path)])
    if is_path(spec):
        raise InputError(f"file not found: {spec}", hint="check the path, or use `builtin`")
    return _hub_documents(spec, split)


def is_path(spec: str, flavour: type[PurePath] = PurePath) -> bool:
    """Whether a text's name looks like a path rather than a name on the hub; ``flavour`` defines the path syntax."""
    path = flavour(spec)
    return spec.startswith((".", "~")) or bool(path.anchor) or path.suffix.lower() in _TEXT_SUFFIXES


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


def _jsonl_documents(path: Path) -> Iterator[str]:
    # Not splitlines(): JSON strings may contain U+2028 and similar, which do not end a line of a .jsonl file.
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # Too many digits, or too deep.
            raise InputError(f"{path}, line {number}: not JSON ({error})", hint=_JSONL_HINT) from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: no `text` field with a string", hint=_JSONL_HINT)
        yield text


def _hub_documents(spec: str, split: Split) -> Iterator[str]:
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
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise InputError(f"{spec} has no `text` column, only: {columns}", hint="convert it to .jsonl with a text field")
    yield from rows["text"]
