"""Do what a page says, on the real model, and compare what is printed with what the page shows (minutes; no test).

    python tests/docs/replay.py docs/start/tutorial.md

Sessions (``console``) and Python examples run one after another in an empty folder. ``...`` stands for any lines.
Numbers may be a few percent off: the built-in text is that of the Python at hand. Times, sizes and tables may be
anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
#: Beginnings of lines whose numbers depend on the machine.
FREE = ("time:", "peak memory:", "│")
TOLERANCE = 0.05


def steps(page: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Commands of a page, and the lines that each is said to print."""
    fences = [t for t in MarkdownIt().parse(page.read_text("utf-8")) if t.type == "fence"]
    for block, after in zip(fences, [*fences[1:], None], strict=True):
        if block.info == "console":
            for session in re.split(r"^\$ ", block.content, flags=re.MULTILINE)[1:]:
                command, *shown = session.replace("\\\n", "").splitlines()
                yield ["bash", "-c", command], shown
        elif block.info == "python":
            yield [sys.executable, "-c", block.content], ["...", *(after.content.splitlines() if after else [])]


def _form(line: str) -> str:
    return NUMBER.sub("#", " ".join(line.split()))


def alike(shown: str, printed: str) -> bool:
    """Whether a line is as shown, but for spaces and the size of numbers."""
    if _form(shown) != _form(printed):
        return False
    if shown.startswith(FREE):
        return True
    pairs = zip(*([float(n.replace(",", "")) for n in NUMBER.findall(line)] for line in (shown, printed)), strict=True)
    return all(abs(a - b) <= TOLERANCE * abs(a) for a, b in pairs)


def missing(shown: list[str], printed: list[str]) -> str | None:
    """The first line that is not printed where it should be; None where all are."""
    rest, anywhere = list(printed), False
    for line in shown:
        if line == "...":
            anywhere = True
            continue
        at = next((i for i, other in enumerate(rest) if alike(line, other)), None)
        if at is None or (at and not anywhere):
            return line
        rest, anywhere = rest[at + 1 :], False
    return None


def main() -> int:
    """Replay the page; 1 where it is wrong."""
    wrong = 0
    found = list(steps(Path(sys.argv[1])))
    # The tutorial's reader has the environment activated.
    activated = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        for command, shown in found:
            print("$", command[-1].splitlines()[0], flush=True)
            done = subprocess.run(
                command, cwd=folder, env=activated, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            line = missing(shown, done.stdout.splitlines()) if done.returncode == 0 else f"exit code {done.returncode}"
            if line is not None:
                wrong += 1
                print(f"not as shown: {line}\n{done.stdout}", flush=True)
    print(f"{len(found) - wrong} of {len(found)} steps as shown")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
