"""Rows of docs/faults.md: texts and values that cannot be used; refused before any costly work."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Run
from faults import copied, refused
from tiny import tiny_model
from tiny_files import write_model

Flags = list[object]

#: Content of the text, what the message must say, and a word of the hint.
TEXTS: dict[str, tuple[str, bytes, str, str]] = {
    "empty": ("t.txt", b"", "t.txt contains no text", "another file"),
    "blank": ("t.txt", b" \n\t\n", "t.txt contains no text", "another file"),
    "empty jsonl": ("t.jsonl", b"\n", "t.jsonl contains no text", "another file"),
    "short": ("t.txt", b"x" * 30, "the text has 30 tokens, but one sequence needs 31", "lower --seqlen"),
    "latin-1": ("t.txt", "caf\xe9 ".encode("latin-1") * 99, "t.txt is not UTF-8 text (byte 3)", "iconv"),
    "utf-16": ("t.txt", ("text " * 99).encode("utf-16"), "t.txt is not UTF-8 text (byte 0)", "iconv"),
    "not JSON": ("t.jsonl", b'{"text": "fine"}\nno json\n', "t.jsonl, line 2: not JSON", '{"text": "..."}'),
    "cut JSON": ("t.jsonl", b'{"text": "fine"}\n{"text": "cu', "t.jsonl, line 2: not JSON", '{"text": "..."}'),
    "deep JSON": ("t.jsonl", b"[" * 99_999, "t.jsonl, line 1: not JSON", '{"text": "..."}'),
    "long number": ("t.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: not JSON", '{"text": "..."}'),
    "half a character": (
        "t.jsonl",
        b'{"text": "fine"}\n{"text": "cut \\ud83d"}\n',
        "t.jsonl, line 2: half of a character",
        "remove what is left of it",
    ),
    "a table": ("t.json", b'[{"text": "fine"}]', "t.json is not a text", "convert it to .jsonl"),
    "packed": ("t.txt.gz", b"\x1f\x8b\x08", "t.txt.gz is not a text", "unpack it first"),
    "no text field": ("t.jsonl", b'{"body": "x"}\n', "line 1: no `text` field", '{"text": "..."}'),
    "no messages": (
        "t.jsonl",
        b'{"messages": "hi"}\n',
        "t.jsonl, line 1: `messages` is not a list",
        '"content": "..."',
    ),
    "no role": ("t.jsonl", b'{"messages": [{}]}\n', "t.jsonl, line 1, message 1: no `role`", '"content": "..."'),
    "no chat template": (
        "t.jsonl",
        b'\n{"messages": [{"role": "user", "content": "x"}]}\n',
        "t.jsonl, line 2: `messages` need a chat template",
        "instruction-tuned",
    ),
    "missing": ("other.txt", b"", "file not found: t.txt", "path"),
}


@pytest.mark.parametrize("way", ["calibrate", "calibrate after --eval", "dry run", "eval", "verify"])
@pytest.mark.parametrize("case", TEXTS)
def test_texts(run: Run, model: Path, text: Path, way: str, case: str) -> None:
    file, content, says, hint = TEXTS[case]
    Path(file).write_bytes(content)
    source = "t.txt" if case == "missing" else file
    flags: Flags = ["--model", model, "--dataset", source, "--seqlen", 32]
    arguments: Flags = {
        "calibrate": ["prune", *flags, "--save", "out"],
        "calibrate after --eval": ["prune", *flags, "--save", "out", "--eval", "--eval-dataset", text],
        "dry run": ["prune", *flags, "--dry-run"],
        "eval": ["eval", *flags],
        "verify": ["verify", *flags],
    }[way]
    error = refused(run, *arguments, code=2, says=says, hint=hint)
    assert "perplexity before" not in error


VALUES = {
    "--sparsity_ratio": (-0.1, 1.1, "nan", "inf"),
    "--nr-q-active": (0, 1, -1, "nan"),
    "--weight-exp": (-1, 11, "nan", "inf"),
    "--input-exp": (-1, 11, "nan"),
    "--tf-exp": (-1, 11, "nan"),
    "--idf-exp": (-11, 11, "nan", "-inf"),
    "--nr-spikiness-exp": (-11, 11, "nan"),
    "--variance-exp": (-1, 11, "nan"),
    "--threshold": ("nan", "inf"),
    "--magnitude-multi": (-1, "inf"),
    "--nsamples": (0, -5),
    "--seqlen": (1, -1),
    "--tokens-per-document": (0,),
    "--pruning_last": (0,),
    "--seed": (-1,),
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in VALUES.items() for value in values])
def test_out_of_range(run: Run, small: Flags, flag: str, value: object) -> None:
    error = refused(run, "prune", *small, "--save", "out", flag, value, code=2, says=f"{flag} is ", hint="--help")
    assert f"is {value}" in error
    assert ", allowed: a" in error
    assert "loading" not in error


def test_more_topics_than_tokens(run: Run, small: Flags) -> None:
    flags = ["--prune_method", "neuronrank_tfidf", "--nr-tfidf-mode", "topic", "--nr-tfidf-k", 129]
    says = "--nr-tfidf-k is 129, allowed: [1, 128], the number of sampled tokens"
    assert "loading" not in refused(run, "prune", *small, *flags, "--save", "out", code=2, says=says, hint="--help")


@pytest.mark.parametrize("way", [["--save", "out"], ["--eval"], ["--save", "out", "--eval"], ["--dry-run"]])
@pytest.mark.parametrize("pattern", ["3:5", "2:7", "1:64"])
def test_a_pattern_that_does_not_divide(run: Run, small: Flags, way: Flags, pattern: str) -> None:
    says = f"--sparsity_type is '{pattern}', allowed: an M that divides the 32 inputs of gate_proj"
    error = refused(run, "prune", *small, "--sparsity_type", pattern, *way, code=2, says=says, hint="--help")
    assert "perplexity before" not in error
    assert "calibrating" not in error


@pytest.mark.parametrize("way", [["--save", "out"], ["--eval"], ["--save", "out", "--eval"], ["--dry-run"]])
def test_a_head_tied_to_the_embeddings(run: Run, small: Flags, way: Flags) -> None:
    says = "the lm_head is tied to the embeddings"
    error = refused(run, "prune", *small, "--nr-prune-lm-head", *way, code=2, says=says, hint="leave out")
    assert "perplexity before" not in error


@pytest.mark.parametrize("command", ["prune", "dry run", "eval", "verify"])
def test_sequences_longer_than_the_model_takes(run: Run, model: Path, text: Path, command: str) -> None:
    config = copied(model) / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 40'))
    more = {"prune": ["--save", "out"], "dry run": ["--dry-run"]}.get(command, [])
    arguments = [command if command in ("eval", "verify") else "prune", "--model", "source", "--dataset", text, *more]
    says = "--seqlen is 41, allowed: [2, 40]"
    refused(run, *arguments, "--seqlen", 41, code=2, says=says, hint="max_position_embeddings")
    run(*arguments, "--seqlen", 40)


@pytest.mark.parametrize("command", [["prune", "--save", "out"], ["eval"], ["verify"]])
def test_a_tokenizer_of_another_model(run: Run, text: Path, command: Flags) -> None:
    write_model("source", tiny_model(layers=2, hidden=32, intermediate=64, vocab=60))
    arguments = [*command, "--model", "source", "--dataset", text, "--seqlen", 32]
    refused(run, *arguments, code=2, says="is outside the model's vocabulary of 60", hint="tokenizer")


@pytest.mark.parametrize("flags", [["--eval-windows", 9999], ["--eval-dataset", "few.txt"]])
@pytest.mark.parametrize("way", [["--save", "out"], ["--dry-run"]])
def test_too_little_to_measure_on(run: Run, small: Flags, text: Path, flags: Flags, way: Flags) -> None:
    Path("few.txt").write_text("few")
    arguments = ["prune", *small, "--eval", "--eval-dataset", text, *flags, *way]
    error = refused(run, *arguments, code=2, says="windows" if "--eval-windows" in flags else "the text has 3 tokens")
    assert "calibrating" not in error


@pytest.mark.parametrize("way", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--effort best --dataset short.txt", "holds out the last 20% of the calibration text"),
        ("--target-params 0.9 --dataset short.txt", "--target-params holds out the last 20% of the calibration text"),
        ("--sparsity_type layers --sparsity_ratio 0.5 --nsamples 1", "needs at least two sequences"),
        (
            "--effort best --prune_method neuronrank_tfidf --nr-tfidf-mode topic --nr-tfidf-k 100",
            "tfidf-k is 100, allowed: [1, 64]",
        ),
        ("--sparsity_type neurons --sparsity_ratio 0.01", "sparsity_ratio is 0.01, allowed: 0, or at least"),
    ],
)
def test_what_only_the_text_tells(run: Run, small: Flags, text: Path, way: list[str], flags: str, says: str) -> None:
    """A dry run refuses what the run refuses."""
    Path("short.txt").write_text(text.read_text()[:61])
    refused(run, "prune", *small, *flags.split(), *way, "--save", "out", code=2, says=says)
