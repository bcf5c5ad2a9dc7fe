"""Every ``neuronrank`` command in the documentation is one that the program understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from pages import Block, blocks

from neuronrank_cli.app import cli


def commands(block: Block) -> Iterator[list[str]]:
    """The commands in a block: those after a ``$`` where it shows a session, else all lines that run the program."""
    # The file is not there; it may name the model.
    text = re.sub(r" --config \S+", " --model x", block.code.replace("\\\n", " "))
    start = r"^\$ +(?:[A-Z_]+=\S+ +)*" if block.language == "console" else r"^ *(?:[A-Z_]+=\S+ +)*"
    for line in re.findall(start + r"(neuronrank\b.*)$", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        end = next((i for i, word in enumerate(words) if word in {">", "|", "&", ";", "&&", "2>"}), len(words))
        if end > 1 and not words[1].startswith("--"):
            yield [re.sub(r"\$\w+", "1", word) for word in words[1:end]]


EXAMPLES = [
    pytest.param(command, id=f"{block.page}:{block.line}-{number}")
    for block in blocks("bash", "console")
    for number, command in enumerate(commands(block))
]


@pytest.mark.parametrize("words", EXAMPLES)
def test_it_is_understood(words: list[str]) -> None:
    with cli.make_context("neuronrank", ["--version"], resilient_parsing=True) as group:
        name, command, rest = cli.resolve_command(group, words)
        assert command is not None
        # Parsed with every check of its flags, but not invoked. --help would end it here.
        command.make_context(name, [word for word in rest if word != "--help"] or ["--model", "x"], parent=group)


def test_some_are_found() -> None:
    assert len(EXAMPLES) > 15
