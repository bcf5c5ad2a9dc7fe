"""Reading text, and cutting sequences from it exactly as documented."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import BOS, tiny_tokenizer

from neuronrank_core.errors import InputError
from neuronrank_torch.text.sequences import bos_token, cut_windows, draw_sequences, tokenize
from neuronrank_torch.text.sources import is_path, load_text, text_fingerprint

STREAM = np.arange(100, 123)


class TestBuiltin:
    def test_splits_partition_the_topics(self):
        calibration, evaluation = load_text("builtin", "calibration"), load_text("builtin", "evaluation")
        where = {name: (text in calibration, text in evaluation) for name, text in topics.items()}
        assert all(sum(places) == 1 for places in where.values()), "a topic is in neither split, or in both"
        assert sum(places[1] for places in where.values()) == -(-len(topics) // 4)

    def test_is_long_enough_to_calibrate_on(self):
        assert len(load_text("builtin", "calibration")) > 200_000
        assert len(load_text("builtin", "evaluation")) > 50_000

    def test_is_the_same_every_time(self):
        assert load_text("builtin", "evaluation") == load_text("builtin", "evaluation")


class TestFiles:
    @pytest.mark.parametrize("split", ["calibration", "evaluation"])
    def test_text_is_read_whole(self, tmp_path, split):
        file = tmp_path / "notes.txt"
        file.write_bytes("\ufeffçà et là\r\nfin\n".encode())
        assert load_text(str(file), split) == "çà et là\nfin\n"

    def test_any_suffix_is_text(self, tmp_path):
        (tmp_path / "README").write_text("plain", encoding="utf-8")
        assert load_text(str(tmp_path / "README"), "calibration") == "plain"

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_text("home", encoding="utf-8")
        assert load_text("~/a.txt", "calibration") == "home"

    def test_jsonl_documents_are_joined_with_a_blank_line(self, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "one\u2028two"}\n\n{"id": 3, "text": "three"}\n', encoding="utf-8")
        assert load_text(str(file), "calibration") == "one\u2028two\n\nthree"

    @pytest.mark.parametrize(
        "bad",
        ['{"text": "cut', '{"body": "x"}', '{"text": 3}', '["text"]', "null"],
        ids=["cut", "key", "int", "list", "null"],
    )
    def test_bad_jsonl_line_is_named(self, tmp_path, bad):
        file = tmp_path / "a.jsonl"
        file.write_text(f'{{"text": "fine"}}\n\n{bad}\n', encoding="utf-8")
        with pytest.raises(InputError, match=r"a\.jsonl, line 3: "):
            load_text(str(file), "calibration")

    def test_other_encoding_is_named(self, tmp_path):
        file = tmp_path / "latin.txt"
        file.write_bytes("caf\xe9".encode("latin-1"))
        with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text \(byte 3\)") as caught:
            load_text(str(file), "calibration")
        assert isinstance(caught.value.__cause__, UnicodeDecodeError)

    @pytest.mark.parametrize("content", ["", " \n\t"])
    def test_empty_file(self, tmp_path, content):
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=r"a\.txt contains no text"):
            load_text(str(tmp_path / "a.txt"), "calibration")

    def test_folder(self, tmp_path):
        with pytest.raises(InputError, match="is a folder"):
            load_text(str(tmp_path), "calibration")

    @pytest.mark.parametrize(
        "spec",
        ["./no", "/no/such", "~/no", "data/no.jsonl", "no.txt", "no.txt.gz", "no.ZIP", "~nosuchuser/no", "../a b"],
    )
    def test_missing_path_is_not_taken_for_a_hub_name(self, spec):
        with pytest.raises(InputError, match=r"file not found|cannot find") as caught:
            load_text(spec, "calibration")
        assert caught.value.exit_code == 2


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch):
        """Put a stand-in for the `datasets` package in place; collects what it is asked for."""
        calls: list[tuple[object, ...]] = []

        class Rows(dict):
            column_names = property(lambda self: list(self))

        def load_dataset(name, config, *, split):
            calls.append((name, config, split))
            if name == "gone":
                raise ConnectionError("no route\nto the hub")
            rows = {"other": {"body": ["x"]}, "holes": {"text": ["a", None]}}
            return Rows(rows.get(name, {"text": ["a", "", "b"]}))

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    @pytest.mark.parametrize(
        ("spec", "split", "expected"),
        [
            ("wikitext", "calibration", ("wikitext", None, "train")),
            ("org/wikitext", "evaluation", ("org/wikitext", None, "test")),
            ("org/wikitext:raw-v1", "evaluation", ("org/wikitext", "raw-v1", "test")),
            ("org/wikitext:raw-v1:validation", "calibration", ("org/wikitext", "raw-v1", "validation")),
            ("wikitext::validation", "evaluation", ("wikitext", None, "validation")),
        ],
    )
    def test_name_config_split(self, asked, spec, split, expected):
        assert load_text(spec, split) == "a\n\n\n\nb"
        assert asked == [expected]

    @pytest.mark.usefixtures("asked")
    def test_a_row_without_text(self):
        with pytest.raises(InputError, match="holes, row 2: `text` is None, not a string"):
            load_text("holes", "calibration")

    @pytest.mark.usefixtures("asked")
    def test_failure_is_one_line_and_keeps_its_cause(self):
        with pytest.raises(
            InputError, match=r"gone is not a local file and could not be downloaded: no route$"
        ) as caught:
            load_text("gone", "calibration")
        assert isinstance(caught.value.__cause__, ConnectionError)

    @pytest.mark.usefixtures("asked")
    def test_other_columns(self):
        with pytest.raises(InputError, match="no `text` column, only: body"):
            load_text("other", "calibration")

    def test_package_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match="wikitext is not a local file") as caught:
            load_text("wikitext", "calibration")
        assert caught.value.hint == "pip install 'neuronrank[hub]'"


class TestTokens:
    @pytest.mark.parametrize("bos", [False, True])
    def test_whole_text_without_specials(self, bos):
        tokenizer = tiny_tokenizer(bos)
        text = "naïve\n\ntext"
        stream = tokenize(tokenizer, text)
        assert stream.dtype == np.int64
        assert stream.shape == (len(text.encode()),)
        assert tokenizer.decode(stream) == text

    def test_longer_than_the_context_is_no_warning(self, caplog):
        tokenizer = tiny_tokenizer()
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            assert tokenize(tokenizer, "x" * 500).shape == (500,)
            assert caplog.records == []
            tokenizer("x" * 500)
            assert caplog.records, "transformers no longer warns: this test shows nothing"
        finally:
            logger.removeHandler(caplog.handler)

    def test_empty_text(self):
        with pytest.raises(InputError, match="empty"):
            tokenize(tiny_tokenizer(True), "")

    def test_bos_is_what_the_tokenizer_does_not_what_it_defines(self):
        assert tiny_tokenizer(False).bos_token_id == BOS
        assert bos_token(tiny_tokenizer(False)) is None
        assert bos_token(tiny_tokenizer(True)) == BOS

    def test_fingerprint_is_sha256(self):
        assert text_fingerprint("é") == hashlib.sha256(b"\xc3\xa9").hexdigest()
        assert text_fingerprint(json.loads('"\\ud800"')) != text_fingerprint("")


class TestDraw:
    @pytest.mark.parametrize(
        ("bos", "bos_mode", "offset"), [(None, "window", 0), (None, "text", 0), (7, "window", 1)], ids=str
    )
    def test_sequences_are_slices_of_the_text(self, bos, bos_mode, offset):
        drawn = draw_sequences(STREAM, nsamples=500, seqlen=6, seed=0, bos=bos, bos_mode=bos_mode)
        assert drawn.shape == (500, 6)
        assert drawn.dtype == np.int64
        assert (drawn[:, :offset] == 7).all()
        body = drawn[:, offset:]
        assert (np.diff(body, axis=1) == 1).all()
        assert set(body[:, 0]) == set(range(100, 123 - body.shape[1] + 1)), "some offsets are never drawn"

    def test_text_mode_has_one_bos(self):
        drawn = draw_sequences(STREAM, nsamples=200, seqlen=6, seed=0, bos=7, bos_mode="text")
        whole = np.concatenate([[7], STREAM])
        expected = {tuple(whole[i : i + 6]) for i in range(len(whole) - 5)}
        assert {tuple(row) for row in drawn} == expected

    def test_seed_decides_and_more_samples_extend(self):
        def draw(nsamples, seed):
            return draw_sequences(STREAM, nsamples=nsamples, seqlen=4, seed=seed, bos=None, bos_mode="window")

        assert np.array_equal(draw(8, 1), draw(16, 1)[:8])
        assert not np.array_equal(draw(8, 1), draw(8, 2))

    def test_text_as_long_as_one_sequence(self):
        drawn = draw_sequences(STREAM, nsamples=2, seqlen=24, seed=0, bos=7, bos_mode="window")
        assert drawn.tolist() == [[7, *STREAM]] * 2

    @pytest.mark.parametrize(("bos", "bos_mode", "has", "needs"), [(7, "window", 23, 24), (7, "text", 24, 25)])
    def test_text_too_short(self, bos, bos_mode, has, needs):
        with pytest.raises(InputError, match=f"has {has} tokens, but one sequence needs {needs}") as caught:
            draw_sequences(STREAM, nsamples=1, seqlen=25, seed=0, bos=bos, bos_mode=bos_mode)
        assert "--seqlen" in caught.value.hint

    @pytest.mark.parametrize("wrong", [{"nsamples": 0}, {"seqlen": 1}])
    def test_out_of_range(self, wrong):
        with pytest.raises(InputError, match=next(iter(wrong))):
            draw_sequences(STREAM, **{"nsamples": 1, "seqlen": 4, **wrong}, seed=0, bos=7, bos_mode="window")

    @pytest.mark.parametrize("nsamples", [10**17, 10**20])
    def test_more_than_any_memory_holds(self, nsamples):
        with pytest.raises(MemoryError, match=f"{nsamples} sequences of 4 tokens"):
            draw_sequences(STREAM, nsamples=nsamples, seqlen=4, seed=0, bos=None, bos_mode="window")


class TestWindows:
    def test_bos_in_every_window(self):
        cut = cut_windows(STREAM[:8], seqlen=4, windows=None, bos=7, bos_mode="window")
        assert cut.tolist() == [[7, 100, 101, 102], [7, 103, 104, 105]]

    def test_bos_at_the_start_of_the_text(self):
        cut = cut_windows(STREAM[:8], seqlen=4, windows=None, bos=7, bos_mode="text")
        assert cut.tolist() == [[7, 100, 101, 102], [103, 104, 105, 106]]

    @pytest.mark.parametrize("bos_mode", ["window", "text"])
    def test_no_bos(self, bos_mode):
        cut = cut_windows(STREAM[:11], seqlen=4, windows=None, bos=None, bos_mode=bos_mode)
        assert cut.tolist() == [[100, 101, 102, 103], [104, 105, 106, 107]]

    def test_some_windows_are_the_first(self):
        cut = cut_windows(STREAM, seqlen=4, windows=2, bos=7, bos_mode="window")
        assert cut.tolist() == [[7, 100, 101, 102], [7, 103, 104, 105]]

    def test_more_windows_than_there_are(self):
        with pytest.raises(InputError, match="6 windows of 4 tokens requested, but the text has 5"):
            cut_windows(STREAM, seqlen=4, windows=6, bos=None, bos_mode="window")

    def test_text_too_short(self):
        with pytest.raises(InputError, match="has 23 tokens, but one sequence needs 30"):
            cut_windows(STREAM, seqlen=30, windows=None, bos=None, bos_mode="window")

    def test_text_that_is_too_short_without_its_bos(self):
        with pytest.raises(InputError, match="1 windows of 4 tokens requested, but the text has 0"):
            cut_windows(np.array([7, 7, 1, 2]), seqlen=4, windows=None, bos=7, bos_mode="window")

    @pytest.mark.parametrize("wrong", [{"windows": 0}, {"seqlen": 1}])
    def test_out_of_range(self, wrong):
        with pytest.raises(InputError, match=next(iter(wrong))):
            cut_windows(STREAM, **{"windows": 1, "seqlen": 4, **wrong}, bos=7, bos_mode="window")


@pytest.mark.parametrize(
    ("spec", "flavour", "path"),
    [
        (r"C:\texts\a", PureWindowsPath, True),
        ("C:/texts/a", PureWindowsPath, True),
        (r"\\server\texts\a", PureWindowsPath, True),
        (r"texts\a.jsonl", PureWindowsPath, True),
        ("/texts/a", PurePosixPath, True),
        ("~/a", PurePosixPath, True),
        ("../a", PurePosixPath, True),
        ("wikitext:wikitext-2-raw-v1", PureWindowsPath, False),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", PurePosixPath, False),
    ],
)
def test_a_path_is_told_from_a_hub_name(spec: str, flavour: type[PurePath], path: bool) -> None:
    assert is_path(spec, flavour) is path
