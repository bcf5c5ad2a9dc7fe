"""Prose, code and documentation, each cut in a part to calibrate on and a part to measure on.

    python benchmarks/mixture.py --prose valid.txt --save out/mixture

Code and documentation are the source and the docstrings of the running Python's standard library, so that no download
is needed. Writes ``{prose,code,docs}-{head,tail}.txt``, and ``mixed-head.txt``, which holds as many characters of each.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import click

#: Where the head ends, as a share of a text.
HEAD = 0.7


def code_and_docs(folder: Path, characters: int) -> tuple[str, str]:
    """Source without its docstrings, and the docstrings, of the modules in ``folder``, each at most so long."""
    code, docs = [], []
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) or ast.get_docstring(node) is None:
                continue
            docs.append(ast.get_docstring(node) or "")
            node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return "\n\n".join(code)[:characters], "\n\n".join(docs)[:characters]


@click.command(context_settings={"show_default": True})
@click.option("--prose", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--save", type=click.Path(path_type=Path), default=Path("out/mixture"))
@click.option("--characters", default=1_200_000, help="At most so many of each.")
def main(prose: Path, save: Path, characters: int) -> None:
    """Write the seven texts."""
    code, docs = code_and_docs(Path(sysconfig.get_path("stdlib")), characters)
    texts = {"prose": prose.read_text(encoding="utf-8")[:characters], "code": code, "docs": docs}
    save.mkdir(parents=True, exist_ok=True)
    cuts = {name: int(HEAD * len(text)) for name, text in texts.items()}
    for name, text in texts.items():
        (save / f"{name}-head.txt").write_text(text[: cuts[name]], encoding="utf-8")
        (save / f"{name}-tail.txt").write_text(text[cuts[name] :], encoding="utf-8")
    shortest = min(cuts.values())
    mixed = "\n\n".join(text[:shortest] for text in texts.values())
    (save / "mixed-head.txt").write_text(mixed, encoding="utf-8")


if __name__ == "__main__":
    main()
