"""Internals of gguf and transformers that reading a GGUF file depends on exist, and only one module uses them."""

from __future__ import annotations

import ast
import importlib
from importlib.metadata import version

import pytest
from pages import ROOT

USER = ROOT / "neuronrank_torch/model/gguf_internals.py"
READER = "transformers.modeling_gguf_pytorch_utils"
#: Names by module. A version that lacks one needs a change in ``neuronrank_torch/model/gguf_internals.py``.
NAMES = {
    "gguf": ["GGUFReader", "dequantize", "get_tensor_name_map"],
    READER: [
        "TENSOR_PROCESSORS",
        "TensorProcessor",
        "get_gguf_hf_weights_map",
        "load_gguf_checkpoint",
        "read_field",
        "tqdm",
    ],
}
ALIAS = {"gguf": "gguf", "reader": READER}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module]])
def test_the_installed_version_has_it(module: str, name: str) -> None:
    package = module.partition(".")[0]
    message = f"{package} {version(package)} has no {module}.{name}: adapt {USER.relative_to(ROOT)}"
    assert hasattr(importlib.import_module(module), name), message


def test_the_list_is_what_the_module_uses() -> None:
    used: dict[str, set[str]] = {module: set() for module in NAMES}
    for node in ast.walk(ast.parse(USER.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ALIAS:
            used[ALIAS[node.value.id]].add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_replace":
            _, module, name, _ = node.args
            assert isinstance(module, ast.Name)
            used[ALIAS[module.id]].add(ast.literal_eval(name))
    assert {module: sorted(names) for module, names in used.items()} == NAMES


def test_no_other_module_uses_them() -> None:
    files = {file for file in ROOT.glob("neuronrank_*/**/*.py") if file != USER}
    users = [
        file.relative_to(ROOT).as_posix()
        for file in sorted(files)
        for line in file.read_text("utf-8").splitlines()
        if line.strip().startswith(("import gguf", "from gguf")) or READER.rpartition(".")[2] in line
    ]
    assert users == []
