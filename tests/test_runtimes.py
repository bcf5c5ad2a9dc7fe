"""Other runtimes continue a text as transformers does, on a model without some neurons, heads and layers.

Each runtime needs an environment of its own (docs/how-to/runtimes.md). A variable names the environment's Python.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import pruned, recipe, state
from tiny import tiny_config, tiny_model
from tiny_files import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronrank_torch.model.depth import keep_layers
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import find_decoder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real model")]
EXAMPLES = Path(__file__).parents[1] / "examples/runtimes"
MODEL = "builtin:smollm2-135m"
PROMPT = (
    "The quick brown fox jumps over the lazy dog while seven wizards brew potions in the castle near a very old river"
)
TOKENS = 12
#: What is removed, one after another.
REMOVED = {"neurons": 0.1667, "query-heads": 0.34, "layers-by-influence": 0.1}
Continue = Callable[[Path], dict[str, Any]]


def ran(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def python_of(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name the Python of an environment with the runtime")
    return os.environ[variable]


@pytest.fixture(scope="module")
def llama_cpp() -> Continue:
    python = python_of("LLAMA_CPP_PYTHON")

    def run(folder: Path) -> dict[str, Any]:
        file = folder.with_suffix(".gguf")
        ran(python, "-m", "convert_hf_to_gguf", folder, "--outtype", "f32", "--outfile", file)
        return json.loads(ran(python, EXAMPLES / "llama_cpp.py", file, PROMPT, TOKENS))

    return run


@pytest.fixture(scope="module")
def onnx_runtime() -> Continue:
    python = python_of("ONNX_RUNTIME_PYTHON")

    def run(folder: Path) -> dict[str, Any]:
        built = folder.with_suffix(".onnx")
        options = ("-p", "fp32", "-e", "cpu", "-c", folder.with_suffix(".cache"))
        ran(python, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", built, *options)
        return json.loads(ran(python, EXAMPLES / "onnx_runtime.py", built, PROMPT, TOKENS))

    return run


@pytest.fixture(scope="module")
def transformers_4() -> Continue:
    python = python_of("TRANSFORMERS_4_PYTHON")
    program = f"""
import json, sys
from pathlib import Path
from typing import Any
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4.")
PROMPT, TOKENS = {PROMPT!r}, {TOKENS}
{inspect.getsource(reference)}
print(json.dumps(dict(zip(("tokens", "logprobs"), reference(Path(sys.argv[1]))))))
"""
    return lambda folder: json.loads(ran(python, "-c", program, folder))


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model: Any = MODEL
    for kind, ratio in REMOVED.items():
        folder = tmp_path_factory.mktemp(kind) / "smaller"
        chosen = ("--sparsity_type", kind, "--sparsity_ratio", ratio, "--nsamples", 2, "--seqlen", 64)
        ran(sys.executable, "-m", "neuronrank_cli", "prune", "--model", model, *chosen, "--save", folder)
        model = folder
    return folder


def reference(folder: Path) -> tuple[list[int], list[float]]:
    """Tokens that transformers continues with, and their log-probabilities."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPT, return_tensors="pt")
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**given, **options, max_new_tokens=TOKENS)
    tokens = found.sequences[0, given.input_ids.shape[1] :].tolist()
    return tokens, [float(row[0].log_softmax(-1)[token]) for row, token in zip(found.logits, tokens, strict=True)]


# llama.cpp keeps keys and values in float16.
@pytest.mark.parametrize(
    ("runtime", "tolerance"), [("llama_cpp", 0.02), ("onnx_runtime", 1e-3), ("transformers_4", 1e-4)]
)
def test_text_is_that_of_transformers(runtime: str, tolerance: float, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(runtime)  # First: without it, nothing needs to be pruned.
    smaller = request.getfixturevalue("smaller")
    config = json.loads((smaller / "config.json").read_text("utf-8"))
    assert [config[name] for name in ("intermediate_size", "num_attention_heads", "num_hidden_layers")] == [1280, 6, 27]
    found = run(smaller)
    tokens, logprobs = reference(smaller)
    assert found["tokens"] == tokens
    assert found["logprobs"] == pytest.approx(logprobs, abs=tolerance)


def gemma(folder: Path, kept: list[int]) -> Path:
    """A random Gemma 3 of which every sixth layer is global, with some of its eight layers."""
    _, tokenizer, _ = load_model(MODEL)
    size: dict[str, Any] = {"layers": 8, "vocab": len(tokenizer)}
    config = tiny_config("gemma3", **size)
    config.layer_types = ["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(8)]
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tiny_model("gemma3", **size).state_dict())
    keep_layers(find_decoder(model), kept)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_llama_cpp_takes_gemma_3_without_its_last_layer(llama_cpp: Continue, tmp_path: Path) -> None:
    folder = gemma(tmp_path / "gemma", list(range(7)))
    tokens, logprobs = reference(folder)
    found = llama_cpp(folder)
    assert found["tokens"] == tokens
    assert found["logprobs"] == pytest.approx(logprobs, abs=0.02)


def test_llama_cpp_ignores_the_pattern_of_gemma_3(llama_cpp: Continue, tmp_path: Path) -> None:
    """If this fails, the page may say that Gemma 3 without other layers works, too."""
    folder = gemma(tmp_path / "gemma", list(range(1, 8)))
    _, logprobs = reference(folder)
    with torch.no_grad():
        assert abs(llama_cpp(folder)["logprobs"][0] - logprobs[0]) > 0.05


def test_lora_is_merged_into_the_same_shapes(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model: Any = tiny_model(layers=4, hidden=48, intermediate=60)
    for kind in ("neurons", "query-heads", "layers-by-influence"):
        pruned(model, recipe(sparsity_type=kind, sparsity_ratio=0.5))
    folder, target = write_model(tmp_path / "smaller", model, bos=False), tmp_path / "recovered"
    lines = ran(sys.executable, EXAMPLES / "recover.py", folder, target, 3).splitlines()
    before, after, merged = (float(re.findall(r"loss ([\d.]+)", line)[0]) for line in lines)
    assert after != before
    assert merged == pytest.approx(after, abs=2e-4)
    trained, start = state(AutoModelForCausalLM.from_pretrained(target)), state(model)
    assert {name: weight.shape for name, weight in trained.items()} == {name: w.shape for name, w in start.items()}
    assert not torch.equal(trained["model.layers.1.mlp.down_proj.weight"], start["model.layers.1.mlp.down_proj.weight"])
