"""Conversations as calibration text: what the chat template writes, token by token."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import BOS, EOS, tiny_tokenizer

from neuronrank_core.errors import InputError
from neuronrank_torch.text.sequences import cut_windows, draw_sequences, tokenize
from neuronrank_torch.text.sources import load_text, read_documents

#: Begins with BOS as LLaMA's, ends every message with EOS, and refuses a role.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}({{ tools[0].name }}){% endif %}{% for m in messages %}"
    "{% if m.role == 'robot' %}{{ raise_exception('no robots\nhere') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}</s>{% endfor %}"
)
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def chat_tokenizer(bos: bool = True) -> Any:
    tokenizer = tiny_tokenizer(bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(folder: Path, *records: Any) -> str:
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_a_document_for_each_conversation_beside_texts(tmp_path, split):
    file = written(tmp_path, {"messages": HI}, {"text": "plain"}, {"messages": HI[:1], "id": 7})
    text = load_text(file, split, chat_tokenizer())
    assert text == "<s>user:hi</s>assistant:yo</s>\n\nplain\n\n<s>user:hi</s>"


def test_a_text_takes_precedence_as_before(tmp_path):
    assert load_text(written(tmp_path, {"text": "plain", "messages": HI}), "calibration") == "plain"


def test_format_of_openai(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    file = written(tmp_path, {"messages": [parts, call], "tools": [{"name": "search"}]})
    assert load_text(file, "calibration", chat_tokenizer()) == "<s>(search)user:ab</s>assistant:</s>"


def test_special_tokens_of_the_template_are_special(tmp_path):
    tokenizer = chat_tokenizer()
    stream = tokenize(tokenizer, load_text(written(tmp_path, {"messages": HI}), "calibration", tokenizer))
    assert stream[0] == BOS
    assert (stream == EOS).sum() == 2
    assert len(stream) == len("user:hiassistant:yo") + 3


def test_a_hub_data_set_with_messages(monkeypatch):
    class Rows(dict):
        column_names = property(lambda self: list(self))

    rows = Rows(id=[1, 2], messages=[HI, "no list"])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    with pytest.raises(InputError, match=r"org/chat, row 2: `messages` is not a list"):
        read_documents("org/chat", "calibration")
    rows["messages"] = [HI]
    assert load_text("org/chat", "calibration", chat_tokenizer()) == "<s>user:hi</s>assistant:yo</s>"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hi", "`messages` is not a list of messages"),
        ([], "`messages` is not a list of messages"),
        (["hi"], "message 1: no `role` with a string"),
        ([*HI, {"content": "x"}], "message 3: no `role` with a string"),
        ([{"role": "user"}], "message 1: no `content` with a text"),
        ([{"role": "user", "content": None}], "message 1: no `content` with a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1: no `content` with a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: no `content` with a text"),
    ],
)
def test_malformed_messages_are_named_before_there_is_a_tokenizer(tmp_path, messages, says):
    file = written(tmp_path, {"messages": HI}, {"messages": messages})
    with pytest.raises(InputError, match=rf"chat\.jsonl, line 2(:|,) {says}") as caught:
        read_documents(file, "calibration")
    assert '"messages"' in caught.value.hint


def test_what_the_template_refuses_is_named(tmp_path):
    file = written(tmp_path, {"messages": HI}, {"messages": [{"role": "robot", "content": "x"}]})
    with pytest.raises(InputError, match=r"chat\.jsonl, line 2: the chat template .* refuses .*: no robots$"):
        load_text(file, "calibration", chat_tokenizer())


def test_a_tokenizer_without_template(tmp_path):
    file = written(tmp_path, {"text": "fine"}, {"messages": HI})
    with pytest.raises(InputError, match=r"chat\.jsonl, line 2: `messages` need a chat template"):
        load_text(file, "calibration", tiny_tokenizer())


class TestNoSecondBos:
    #: Conversations of five tokens that begin with BOS.
    STREAM = np.array([7, 1, 2, 3, 4] * 6)

    def test_drawn(self):
        drawn = draw_sequences(self.STREAM, nsamples=300, seqlen=8, seed=0, bos=7, bos_mode="window")
        expected = set()
        for start in range(len(self.STREAM) - 6):
            body = self.STREAM[start:][: 7 + 1]
            body = body[1:] if body[0] == 7 else body[:7]
            expected |= {(7, *body)} if len(body) == 7 else set()
        assert {tuple(row) for row in drawn} == expected
        assert (drawn[:, 1] != 7).all()

    def test_drawn_where_the_last_slice_would_start_with_bos(self):
        drawn = draw_sequences(self.STREAM, nsamples=300, seqlen=6, seed=0, bos=7, bos_mode="window")
        assert (self.STREAM[-5:] == [7, 1, 2, 3, 4]).all()
        assert {tuple(row[:3]) for row in drawn} == {(7, 1, 2), (7, 2, 3), (7, 3, 4), (7, 4, 7)}

    def test_cut(self):
        cut = cut_windows(self.STREAM[:19], seqlen=5, windows=None, bos=7, bos_mode="window")
        assert cut.tolist() == [[7, 1, 2, 3, 4], [7, 1, 2, 3, 4], [7, 1, 2, 3, 4]]

    def test_at_the_start_of_the_text(self):
        cut = cut_windows(self.STREAM[:8], seqlen=4, windows=None, bos=7, bos_mode="text")
        assert cut.tolist() == [[7, 1, 2, 3], [4, 7, 1, 2]]
