"""The tree in the README is that of the repository, and the files that it names exist."""

from __future__ import annotations

import re

from pages import DOCS, PAGES, ROOT

README = (ROOT / "README.md").read_text("utf-8")
PACKAGES = ("neuronrank_core", "neuronrank_torch", "neuronrank_cli")


def tree() -> dict[str, str]:
    """Folders of the tree by path, with their captions."""
    [block] = re.findall(r"## Repository\n\n```text\n(.*?)```", README, re.DOTALL)
    found: dict[str, str] = {}
    above: list[str] = []
    for line in block.splitlines():
        indent, name, caption = re.fullmatch(r"( *)(\S+)/ +(\S.*)", line).groups()  # type: ignore[union-attr]
        above = [*above[: len(indent) // 2], name]
        found["/".join(above)] = caption
    return found


def folders(package: str) -> set[str]:
    """A package's folders of Python files, itself among them."""
    return {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / package).rglob("*.py")}


def test_every_folder_of_the_tree_exists() -> None:
    assert [folder for folder in tree() if not (ROOT / folder).is_dir()] == []


def test_no_folder_of_a_package_is_missing() -> None:
    assert {folder for package in PACKAGES for folder in folders(package)} - tree().keys() == set()
    tests = {f"tests/{file.name}" for file in (ROOT / "tests").iterdir() if file.is_dir() and any(file.glob("**/*.py"))}
    assert tests - tree().keys() == set()


def test_the_main_path_exists() -> None:
    named = re.findall(r"^\d\. `(\S+\.py)`", README, re.MULTILINE)
    assert len(named) == 5
    assert [file for file in named if not (ROOT / file).is_file()] == []


def test_a_page_that_the_code_names_exists() -> None:
    named = {
        (file.relative_to(ROOT).as_posix(), page)
        for folder in (*PACKAGES, "benchmarks", "examples", "tests")
        for file in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|svg)", file.read_text("utf-8"))
    }
    assert len(named) > 5
    assert [(file, page) for file, page in sorted(named) if not (ROOT / page).is_file()] == []


def test_no_two_pages_have_one_name() -> None:
    names = [page.name for page in PAGES.values() if page.is_relative_to(DOCS)]
    assert sorted({name for name in names if names.count(name) > 1}) == []
