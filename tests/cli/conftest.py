"""A tiny model and a text on disk, made once; and the command, run in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command import LAYERS, Run
from tiny import tiny_model
from tiny_files import write_model

from neuronrank_cli.app import cli


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_model(folder, tiny_model(layers=LAYERS, hidden=32, intermediate=64))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(" ".join(f"Sentence {i} has {i * i} as its square." for i in range(200)), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flags from outside, and no terminal, whatever the shell or the build server says."""
    terminal = {"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    for name in [name for name in os.environ if name.startswith("NEURONRANK_") or name in terminal]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """``run("prune", "--seed", 1, code=2, env={...}, stdin="...")``: the result, after a check of the exit code.

    None is any code.
    """
    monkeypatch.chdir(tmp_path)

    def invoke(
        *arguments: object, code: int | None = 0, env: dict[str, str] | None = None, stdin: str | None = None
    ) -> Result:
        result = CliRunner().invoke(cli, [str(a) for a in arguments], env=env, input=stdin)
        assert code is None or result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return invoke


@pytest.fixture
def small(model: Path, text: Path) -> list[object]:
    """Flags of a run that takes a fraction of a second."""
    return ["--model", model, "--dataset", text, "--nsamples", 4, "--seqlen", 32]


@pytest.fixture
def measured(text: Path) -> list[object]:
    """Flags that have perplexity measured, briefly."""
    return ["--eval", "--eval-dataset", text, "--eval-windows", 2]
