"""Draws command lines, and damages every file that is read; nothing may end in a traceback or hang.

    python tests/stress/fuzz.py --examples 2000

Both are drawn by Hypothesis, so a seed repeats them. One line of JSON on stdout says how many examples ended how, and
each problem is told with what repeats it. Exit code 1 if there is one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny import tiny_model, tiny_tokenizer
from tiny_files import small, write_gguf

from neuronrank_cli import command
from neuronrank_cli.app import cli
from neuronrank_torch.model.quiet import quiet_transformers

#: What our own code raises only by mistake; a broad `except` must not make an answer of it.
BUGS = (TypeError, AttributeError, NameError, IndexError, AssertionError, ZeroDivisionError, RecursionError)
OWN = ("neuronrank_core", "neuronrank_torch", "neuronrank_cli")
TEXT = " ".join(f"Sentence {i} has {i * i} as its square." for i in range(40))
#: A run that takes some milliseconds.
FEW = ["--nsamples", "2", "--seqlen", "16"]


class Hang(BaseException):
    """An example took longer than its limit."""


@dataclass
class Result:
    """How the examples ended."""

    ends: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, arguments: list[str], what: str, limit: float) -> None:
        """Run a command; note how it ended, and what is wrong with that."""
        started = time.perf_counter()
        end, problem = ended(arguments, limit)
        self.slowest = max(self.slowest, time.perf_counter() - started)
        self.ends[end] += 1
        if self.ends.total() % 100 == 0:
            click.echo(f"{dict(self.ends)}, {len(self.problems)} problems", err=True)
        if problem:
            self.problems.append({"arguments": arguments, "what": what, "problem": problem})
            click.echo(json.dumps(self.problems[-1])[:1000], err=True)


def ended(arguments: list[str], limit: float) -> tuple[str, str]:
    """Run a command in the working folder: how it ended, and what is wrong with that, if anything."""
    seen: list[Exception] = []
    explain = command.explain

    def remembering(error: Exception, flags: Any) -> Any:
        seen.append(error)
        return explain(error, flags)

    command.explain = remembering  # type: ignore[assignment]
    try:
        with _limited(limit):
            result = CliRunner().invoke(cli, arguments)
    except Hang:
        return "hang", "hang"
    finally:
        command.explain = explain
    end = f"exit {result.exit_code}"
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    if result.exit_code not in (0, 1, 2):
        return end, f"exit code {result.exit_code}: {result.output[-300:]}"
    if "Traceback" in result.output or not isinstance(result.exception, (SystemExit, type(None))):
        return end, f"traceback: {result.exception!r} {result.output[-300:]}"
    if "unexpected error" in result.stderr:
        return end, f"unexpected error: {errors} {_where(seen[0])}"
    for error in seen:
        if swallowed := _own_bug(error):
            return end, f"a bug was taken for wrong input: {swallowed!r} {_where(swallowed)}"
    if (result.exit_code != 0) != (len(errors) == 1) and "verdict" not in result.stdout:
        return end, f"{len(errors)} lines of error for exit code {result.exit_code}: {result.output[-300:]}"
    if result.exit_code and (Path("out").exists() or list(Path.cwd().glob(".*.old-*"))):
        return end, "something is left under the output's name"
    return end, ""


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    """Work in a folder, as ``contextlib.chdir`` does from Python 3.11 on."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No hub: it would be asked for whatever looks like a name, five times."""
    refusal = ConnectionError("no hub in the fuzz")
    with (
        mock.patch("huggingface_hub.snapshot_download", side_effect=refusal),
        mock.patch.dict(sys.modules, {"datasets": None}),
    ):
        yield


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise Hang in what takes longer; what does not even listen to that ends the process, with a traceback."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(10 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def _own_bug(error: BaseException | None) -> BaseException | None:
    """The first cause of an error that our own code raised by mistake."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, BUGS) and frames and any(f"/{package}/" in frames[-1].filename for package in OWN):
            return error
        error = error.__cause__
    return None


def _where(error: BaseException) -> str:
    return " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-6:-1])


# What is drawn -------------------------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.sampled_from(
        ["", "-", "--", "nan", "-inf", "1e999", "0x1", "1_0", "None", "\x00", "é\u202e", "../..", "a" * 5000]
    ),
    st.text(max_size=8),
)
WHOLE = st.one_of(st.integers(1, 20), st.integers(-2, 40), st.sampled_from([10**12, -(10**12), 10**20, 2**63]))
REAL = st.one_of(
    st.floats(-12, 12),
    st.floats(0, 1),
    st.floats(0.1, 3),
    st.sampled_from([float("nan"), float("inf"), 1e308, -1e308, 5e-324]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 600), REAL, st.sampled_from([2**40, -(2**63), 10**30]), JUNK),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)
MODELS = ["model", "model", "sharded", "tiny.gguf", "gone", "empty", "text.txt", "", ".", "builtin:x", "./a\x00b"]
TEXTS = ["text.txt", "text.jsonl", "builtin", "gone.txt", "empty", "blank.txt", "model", ""]
PLACES = [
    "out",
    "out",
    "new/out",
    "best.toml",
    "page.html",
    "model",
    "stats",
    "text.txt",
    "text.txt/out",
    ".",
    "/proc/none",
    "empty",
    "",
]
#: Values of flags that name something in the working folder.
NAMES = {
    "model": MODELS,
    "dataset": TEXTS,
    "eval_dataset": TEXTS,
    "save": PLACES,
    "stats": ["stats", "model", "gone", "empty", "text.txt", ""],
    "config": ["run.toml", "gone.toml", "text.txt", "model", ""],
    # Of what takes long because it is asked to, there is nothing to learn: all windows of a whole text, 2^63 trials.
    "test_dataset": [text for text in TEXTS if text != "builtin"],
    "trials": ["10", "11", "9", "0", "-1", "nan"],
    "storage": ["best.db", "new/best.db", "text.txt", "model", "sqlite://", "x://y", ""],
    "show": ["prune", "eval", "config", "nope"],
}
#: A search that takes a second.
BRIEF = ["--trials", "10", "--eval-dataset", "other.txt", "--eval-windows", "1"]
#: Flags that most examples have, so that not all end at the first wrong value.
LIKELY = {
    "prune": ["--model", "model", "--dataset", "text.txt", *FEW, "--save", "out"],
    "eval": ["--model", "model", "--dataset", "text.txt", "--seqlen", "16", "--windows", "2"],
    "verify": ["--model", "model", "--dataset", "text.txt", *FEW],
    "collect": ["--model", "model", "--dataset", "text.txt", *FEW, "--save", "out"],
    "merge": ["stats", "stats2", "--save", "out"],
    "config": ["--show", "prune"],
    "tune": ["--model", "model", "--stats", "stats", *BRIEF, "--save", "best.toml"],
    "report": ["pruned", "--new-tokens", "2", "--save", "page.html"],
    "compare": ["pruned", "model"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with flags of its own, their values right or wrong."""
    name = draw(st.sampled_from([*sorted(cli.commands), "prune", "prune", "prune"]))
    parameters = [p for p in cli.commands[name].params if isinstance(p, click.Option)]
    arguments = [name, *(LIKELY.get(name, []) if draw(st.integers(0, 9)) else [])]
    for parameter in draw(st.lists(st.sampled_from(parameters), max_size=4, unique=True)):
        spelling = draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts]))
        if draw(st.booleans()):
            spelling = "--" + spelling[2:].replace("-", "_")
        arguments += [spelling] if parameter.is_flag else [spelling, draw(_values(parameter))]
    if draw(st.integers(0, 9)) == 0:
        arguments.insert(draw(st.integers(0, len(arguments))), draw(JUNK))
    return [argument.replace("\x00", "") for argument in arguments]  # No system hands on a zero byte.


def _values(parameter: click.Option) -> st.SearchStrategy[str]:
    """Values of a flag: most of the right kind, if not in the right range."""
    kind = parameter.type
    if parameter.name in NAMES:
        right = st.sampled_from(NAMES[parameter.name])
    elif isinstance(kind, click.Choice):
        right = st.sampled_from([str(choice) for choice in kind.choices])
    elif isinstance(kind, (click.types.IntParamType, click.IntRange)):
        right = WHOLE.map(str)
    elif isinstance(kind, (click.types.FloatParamType, click.FloatRange)):
        right = REAL.map(repr)
    else:
        right = st.sampled_from(["2:4", "4:8", "3:7", "neurons", "unstructured", "cpu", "cuda:7", "0:2", "1:1", "meta"])
    return st.integers(0, 7).flatmap(lambda chance: right if chance else JUNK)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's content with something cut, flipped, doubled, or with another value in its JSON."""
    how = draw(st.sampled_from(["cut", "flip", "drop", "double", "junk", "json", "json", "json"]))
    start = draw(st.integers(0, len(content)))
    end = min(len(content), start + draw(st.integers(0, 64)))
    if how == "json":
        return _damaged_json(draw, content)
    if how == "flip":
        changed = bytearray(content)
        for _ in range(draw(st.integers(1, 8)) if content else 0):
            # Half of them near the beginning, where the formats have their headers.
            at = draw(st.integers(0, len(content) - 1 if draw(st.booleans()) else min(64, len(content) - 1)))
            changed[at] = draw(st.integers(0, 255))
        return bytes(changed)
    return {
        "cut": content[:start],
        "drop": content[:start] + content[end:],
        "double": content[:end] + content[start:],
        "junk": content[:start] + draw(st.binary(max_size=40)) + content[end:],
    }[how]


def _damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Change one value in a JSON file, in each line of a .jsonl file, or in the header of a safetensors file."""
    before, text, after = b"", content, b""
    if content[8:9] == b"{":
        length = int.from_bytes(content[:8], "little")
        before, text, after = b"header", content[8 : 8 + length], content[8 + length :]
    try:
        value = json.loads(text)
    except ValueError:
        return content[: len(content) // 2] + draw(st.binary(max_size=8))
    place: Any = {"": value}
    key: Any = ""
    for _ in range(draw(st.integers(0, 5))):
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        place, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    if place and key != "" and draw(st.integers(0, 3)) == 0:
        del place[key]
    else:
        place[key] = draw(JSON)
        value = place[key] if key == "" else value
    changed = json.dumps(value).encode()
    return len(changed).to_bytes(8, "little") + changed + after if before else changed


# What is fuzzed ------------------------------------------------------------------------------------------------------


def prepared(place: Path) -> None:
    """Everything that the commands read, in the working folder ``place``."""
    for name, shard_size in (("model", "1GB"), ("sharded", "12KB")):
        with quiet_transformers():
            tiny_model(layers=2, hidden=16, intermediate=32).save_pretrained(place / name, max_shard_size=shard_size)
            tiny_tokenizer(True).save_pretrained(place / name)
    write_gguf(place / "tiny.gguf", small())
    (place / "empty").mkdir()
    (place / "blank.txt").write_text(" \n")
    (place / "text.txt").write_text(TEXT)
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{TEXT} {i}"}) for i in range(3)))
    (place / "run.toml").write_text('[prune]\nmodel = "model"\ndataset = "text.txt"\nnsamples = 2\nseqlen = 16\n')
    (place / "other.txt").write_text(TEXT[::-1])
    with _within(place):
        _must(["prune", *LIKELY["prune"][:-1], "pruned"])
        common = ["collect", "--model", "model", "--dataset", "text.txt", "--nsamples", "4", "--seqlen", "16"]
        for name, documents in (("stats", "0:2"), ("stats2", "2:4")):
            _must([*common, "--documents", documents, "--batch-size", "2", "--save", name])
        _interrupted(["prune", *LIKELY["prune"]])


def _must(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    if result.exit_code:
        raise RuntimeError(f"{arguments}: {result.output}")


def _interrupted(arguments: list[str]) -> None:
    """Leave the folder of a run that was stopped after its first layer."""
    from neuronrank_torch.saving.model_writer import ModelWriter

    keep = ModelWriter.keep

    def stop(self: Any, unit: Any, report: Any = None) -> None:
        keep(self, unit, report)
        raise KeyboardInterrupt

    ModelWriter.keep = stop  # type: ignore[method-assign]
    try:
        CliRunner().invoke(cli, arguments)
    finally:
        ModelWriter.keep = keep  # type: ignore[method-assign]


def readers() -> dict[str, list[list[str]]]:
    """Files by pattern, and the commands that read them."""
    load = [
        ["prune", *LIKELY["prune"][4:], "--dataset", "text.txt", "--model"],
        ["prune", "--dataset", "text.txt", *FEW, "--eval", "--eval-dataset", "text.txt", "--model"],
        ["eval", *LIKELY["eval"][2:], "--model"],
    ]
    stats = [["prune", "--model", "model", "--save", "out", "--stats", "stats"], ["merge", *LIKELY["merge"]]]
    measured = ["--eval-dataset", "text.txt", "--eval-windows", "2", "--seqlen", "16"]
    pruned = [
        ["report", *LIKELY["report"]],
        ["report", *LIKELY["report"], "--stats", "stats", "--dataset", "text.txt"],
        ["compare", *LIKELY["compare"]],
        ["compare", "pruned", "pruned", "--eval", *measured],
    ]
    text = [
        ["prune", "--model", "model", *FEW, "--dry-run", "--dataset"],
        ["eval", "--seqlen", "16", "--model", "model", "--dataset"],
    ]
    return {
        **{f"model/{name}": [[*one, "model"] for one in load] for name in ("*.json", "*.safetensors", "config.json")},
        **{f"sharded/{name}": [[*one, "sharded"] for one in load] for name in ("*.index.json", "*.safetensors")},
        "tiny.gguf": [[*one, "tiny.gguf"] for one in load],
        ".out.partial/*.json": [["prune", *LIKELY["prune"]]],
        ".out.partial/*.safetensors": [["prune", *LIKELY["prune"]]],
        "stats/*.json": stats,
        "stats/*.safetensors": stats,
        "pruned/*.json": pruned,
        "pruned/*.safetensors": pruned,
        "text.jsonl": [[*one, "text.jsonl"] for one in text],
        "text.txt": [[*one, "text.txt"] for one in text],
        "run.toml": [
            ["prune", "--config", "run.toml", "--save", "out"],
            ["config", "--show", "prune", "--config", "run.toml"],
        ],
    }


def repeated(examples: int, seed: int, act: Callable[[st.DataObject], None]) -> None:
    """Have Hypothesis draw so many examples."""
    chosen = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seeded(seed)(chosen(given(st.data())(act)))()


def fuzz(examples: int, seed: int = 0, limit: float = 60.0) -> dict[str, Result]:
    """Run so many command lines and so many damaged files."""
    results = {"command lines": Result(), "damaged files": Result()}
    with tempfile.TemporaryDirectory() as temporary, _offline():
        source, place = Path(temporary, "source"), Path(temporary, "place")
        source.mkdir()
        prepared(source)

        @contextlib.contextmanager
        def fresh() -> Iterator[None]:
            # Times are kept: statistics know their model by them.
            shutil.copytree(source, place)
            with _within(place):
                yield
            shutil.rmtree(place)

        def command_line(data: st.DataObject) -> None:
            arguments = data.draw(command_lines())
            with fresh():
                results["command lines"].add(arguments, "", limit)

        def damaged_file(data: st.DataObject) -> None:
            pattern = data.draw(st.sampled_from(sorted(readers())))
            name = data.draw(st.sampled_from(sorted(str(file.relative_to(source)) for file in source.glob(pattern))))
            arguments = data.draw(st.sampled_from(readers()[pattern]))
            content = data.draw(damaged((source / name).read_bytes()))
            with fresh():
                Path(name).write_bytes(content)
                before = len(results["damaged files"].problems)
                results["damaged files"].add(arguments, name, limit)
                if len(results["damaged files"].problems) > before:
                    results["damaged files"].problems[-1]["content"] = repr(content[:3000])

        repeated(examples, seed, command_line)
        repeated(examples, seed, damaged_file)
    return results


@click.command(context_settings={"show_default": True})
@click.option("--examples", default=2000, help="Command lines, and as many damaged files.")
@click.option("--seed", default=0)
@click.option("--limit", default=60.0, help="Seconds that an example may take.")
def main(examples: int, seed: int, limit: float) -> None:
    """Fuzz the command line and every file that it reads."""
    started = time.perf_counter()
    results = fuzz(examples, seed, limit)
    for name, result in results.items():
        for problem in result.problems:
            click.echo(json.dumps({"in": name, **problem}))
        figures = {"examples": result.ends.total(), **result.ends, "problems": len(result.problems)}
        click.echo(json.dumps({name: figures, "slowest": round(result.slowest, 2)}))
    click.echo(json.dumps({"seconds": round(time.perf_counter() - started)}))
    sys.exit(any(result.problems for result in results.values()))


if __name__ == "__main__":
    main()
