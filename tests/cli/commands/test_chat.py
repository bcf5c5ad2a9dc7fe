"""``neuronrank chat``: what the models say by themselves, in turns, side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import LAYERS, Run
from faults import predicts_nan
from tiny import tiny_model, tiny_tokenizer
from tiny_files import greedy, write_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model than ``model``."""
    return write_model(tmp_path / "other", tiny_model(layers=LAYERS, hidden=32, intermediate=64, seed=5))


@pytest.fixture
def talking(other: Path) -> Path:
    """The same, with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(other)
    return other


def said(result: Any) -> list[list[str]]:
    return [turn["answers"] for turn in json.loads(result.stdout)["turns"]]


def test_two_models_continue_each_prompt(run: Run, model: Path, other: Path) -> None:
    flags = ["chat", model, other, "--max-new-tokens", 6]
    result = run(*flags, "--json", stdin="One.\n\n  \nand two\n")
    assert [turn["prompt"] for turn in json.loads(result.stdout)["turns"]] == ["One.", "and two"]
    expected = [[greedy(folder, prompt, 6) for folder in (model, other)] for prompt in ("One.", "and two")]
    assert expected[0][0] != expected[0][1]
    assert said(result) == expected
    for name in (model, other):
        assert f"Warning: {name} has no chat template: it continues each prompt, without the earlier" in result.stderr
    shown = run(*flags, stdin="One.\nand two").stdout
    lines = [f"> One.\nA: {expected[0][0].strip()}\nB: {expected[0][1].strip()}\n"]
    lines += [f"> and two\nA: {expected[1][0].strip()}\nB: {expected[1][1].strip()}\n"]
    assert shown == "".join(lines)
    assert run("chat", model, *flags[3:], stdin="One.").stdout == f"> One.\n{expected[0][0].strip()}\n"


def test_a_tokenizer_that_makes_no_attention_mask(run: Run, model: Path, talking: Path) -> None:
    flags = ["chat", model, talking, "--max-new-tokens", 4, "--json"]
    expected = said(run(*flags, stdin="One."))
    for folder in (shutil.copytree(one, one.name + "-bare") for one in (model, talking)):
        file = Path(folder, "tokenizer_config.json")
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "model_input_names": ["input_ids"]}))
    bare = ["chat", model.name + "-bare", talking.name + "-bare", *flags[3:]]
    assert said(run(*bare, stdin="One.")) == expected


def test_a_template_makes_it_a_conversation(run: Run, model: Path, talking: Path) -> None:
    result = run("chat", talking, model, "--max-new-tokens", 5, "--json", stdin="Hi\nWhy?\n")
    first = greedy(talking, "<user>Hi;<assistant>", 5, special=False)
    second = greedy(talking, f"<user>Hi;<assistant>{first};<user>Why?;<assistant>", 5, special=False)
    assert first != second
    assert said(result) == [[first, greedy(model, "Hi", 5)], [second, greedy(model, "Why?", 5)]]
    assert f"{model} has no chat template" in result.stderr
    assert f"{talking} has no" not in result.stderr


def test_side_by_side_on_a_terminal(run: Run, model: Path, talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["an answer [b]of the first[/b] " * 3, "one of the second"])
    monkeypatch.setattr("neuronrank_torch.runs.chat._Speaker.reply", lambda *_: next(texts))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    shown = run("chat", model, talking, stdin="Go").stdout
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert {len(row) for row in rows} == {60}
    first, second = (" ".join(row.split("│")[side].strip() for row in rows).strip() for side in (1, 2))
    assert first == " ".join(["an answer [b]of the first[/b]"] * 3)
    assert second == "one of the second"


def test_without_a_prompt(run: Run, model: Path) -> None:
    assert "Error: there is no prompt on stdin\nHint: give one per line" in run("chat", model, stdin="", code=2).stderr


def test_drawn_tokens_follow_the_seed(run: Run, model: Path) -> None:
    flags = ["chat", model, model, "--max-new-tokens", 12, "--json"]

    def draw(*more: object) -> list[list[str]]:
        return said(run(*flags, *more, stdin="Go\nGo\n"))

    drawn = draw("--temperature", 1.5, "--seed", 3)
    assert drawn == draw("--temperature", 1.5, "--seed", 3)
    assert [a == b for a, b in drawn] == [True, True]  # The same model with the same random numbers.
    assert drawn[0] != drawn[1]
    assert drawn != draw("--temperature", 1.5, "--seed", 4)
    assert draw("--temperature", 1e-4) == draw()
    assert "--seed has no effect without --temperature" in run(*flags, "--seed", 1, stdin="Go").stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-new-tokens", 510], "Error: --max-new-tokens is 510, allowed: [0, 509] after a prompt of 3 tokens"),
        (["--temperature", -1], "Error: --temperature is -1.0, allowed: [0, inf)"),
        (["--temperature", "nan"], "Error: --temperature is nan, allowed: [0, inf)"),
        (["--device", "nowhere"], "Error: device nowhere is not available"),
    ],
)
def test_mistakes(run: Run, model: Path, flags: list[object], says: str) -> None:
    assert says in run("chat", model, *flags, stdin="Go", code=2).stderr


def test_a_conversation_that_becomes_too_long(run: Run, talking: Path) -> None:
    shown = run("chat", talking, "--max-new-tokens", 4, stdin=f"Hi\n{'x' * 480}\n", code=2)
    assert "Error: the prompt has 527 tokens, but the model has 512 positions" in shown.stderr
    assert shown.stdout.startswith("> Hi\n")
    shown = run("chat", talking, "--max-new-tokens", 40, stdin="x" * 470, code=2)
    assert "Error: --max-new-tokens is 40, allowed: [0, " in shown.stderr


def test_a_template_that_refuses(run: Run, talking: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained(talking)
    shown = run("chat", talking, stdin="Hi", code=2)
    assert "Error: the chat template of the model refuses the conversation: no users here" in shown.stderr


def test_only_the_request_decides_how_text_is_written(run: Run, model: Path) -> None:
    own = Path(shutil.copytree(model, "own"))
    settings = json.loads((own / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 9.0, "top_k": 1, "do_sample": True}
    (own / "generation_config.json").write_text(json.dumps(settings))
    flags = ["--max-new-tokens", 12, "--json"]
    assert said(run("chat", own, *flags, stdin="One.")) == [[greedy(model, "One.", 12)]]
    drawn = [run("chat", own, *flags, "--temperature", 50, "--seed", seed, stdin="One.") for seed in (1, 2, 10**25)]
    assert len({str(said(result)) for result in drawn}) == 3


def test_what_was_said_before_a_prompt_that_fails_is_kept(run: Run, model: Path) -> None:
    result = run("chat", model, "--max-new-tokens", 3, "--json", stdin="One.\n" + "x" * 9999, code=2)
    assert said(result) == [[greedy(model, "One.", 3)]]
    assert "Error: the prompt has 10000 tokens, but the model has 512 positions" in result.stderr


def test_a_model_that_predicts_nan(run: Run, model: Path) -> None:
    error = run("chat", predicts_nan(model), "--temperature", 1, stdin="One.", code=1).stderr
    assert "Error: the model predicts NaN or Inf" in error
    assert "unexpected" not in error
