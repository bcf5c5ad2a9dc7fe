"""Prunes a tiny random model of every type of transformers; says which are pruned, refused, and pruned wrongly.

    python tests/stress/model_types.py --json sweep.jsonl --page docs/reference/model-types.md

One line of JSON a type. What is right is decided by hooks on plain forward passes and by looking at all parameters of
the layers, never by the code under test. Exit code 1 if a type is wrong or crashes. Linux and macOS only.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.pytorch_utils import Conv1D

# This checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from tiny import tiny_tokenizer
from tiny_types import TYPES, VARIANTS, base, tiny_type

from neuronrank_core import NeuronRankError, Recipe
from neuronrank_core.errors import first_line
from neuronrank_torch import find_decoder, prune, run_prune
from neuronrank_torch.calibration.layerwise import run_layers
from neuronrank_torch.model.quiet import quiet_transformers
from neuronrank_torch.runs.job import Job
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text

SECONDS = 60
SMALL = {"method": "wanda", "nsamples": 4, "seqlen": 16}
BASE = Recipe(**SMALL, sparsity_ratio=0.5)
#: What is tried where a plain prune is right.
COLUMNS = ("2:4", "gradual", "neurons", "attention", "streamed")
#: First words of the classes of experts that store matrices as (in_features, out_features).
TRANSPOSED = ("Aria", "GptOss", "Llama4")
OUTCOMES = ("pruned", "refused", "wrong", "crash", "not built")


class TooLong(BaseException):
    """A type took longer than its limit."""


@dataclass
class Result:
    """What came of a type.

    Parameters
    ----------
    model_type : str
    outcome : str
        One of :data:`OUTCOMES`.
    line : str
        The refusal, or the exception and where it was raised.
    problems : list of str
        What is wrong.
    layout : list of str
        The matrices of the MLPs, as found by name.
    columns : dict
        By name: "yes", "refused: ...", "changed: ...", "wrong: ...", "crash: ..." or "-".
    seconds : float
    """

    model_type: str
    outcome: str = "not built"
    line: str = ""
    problems: list[str] = field(default_factory=list)
    layout: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


# What a layer holds, by brute force.

_MLP = re.compile(
    r"mlp|feed_?forward|ffn|fc|dense|expert|moe|intermediate|(gate|up|down)_?proj|(^|\.)(w[123]|ff)(\.|$)"
)
_OTHER = re.compile(
    r"attn|attention|router|norm|mamba|ssm|conv|lora|laurel|altup|indexer|(^|\.)(shared_expert_)?gate(\.|$)"
)


def mlp_parts(layer: nn.Module) -> dict[str, Tensor]:
    """Matrices of a layer's MLPs and experts, by their path; found by their names alone."""
    parts: dict[str, Tensor] = {}
    for path, module in layer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = isinstance(module, (nn.Linear, Conv1D)) and name == "weight"
            many = parameter.ndim == 3 or (parameter.ndim == 2 and (matrix or "expert" in path))
            if many and not name.endswith("bias") and min(parameter.shape[-2:]) > 1:
                full = f"{path}.{name}".removesuffix(".weight")
                if _MLP.search(full.lower()) and not _OTHER.search(full.lower()):
                    parts[full] = parameter
    return parts


def layout_of(layers: Iterable[nn.Module]) -> list[str]:
    """The MLP matrices of all layers, numbers left out."""
    found = set()
    for layer in layers:
        kinds = {f"{path}.weight": type(module).__name__ for path, module in layer.named_modules()}
        for path, part in mlp_parts(layer).items():
            kind = "3d" if part.ndim == 3 else kinds.get(f"{path}.weight", "2d")
            found.add(
                re.sub(r"(^|\.)\d+", "", path)
                + (f" ({kind})" if kind not in ("Linear", "NonDynamicallyQuantizableLinear") else "")
            )
    return sorted(found)


Calls = list[tuple[nn.Module, Tensor]]


def inputs(model: Any, sequence: Tensor) -> dict[str, Any]:
    """What a model is called with: tokens alone."""
    tokens = {"input_ids": sequence[None], "use_cache": False}
    return tokens | ({"decoder_input_ids": sequence[None]} if model.config.model_type == "t5gemma2" else {})


@torch.no_grad()
def plain_calls(model: Any, sequences: Tensor) -> Calls:
    """Each call of a module of a list, in order, with the hidden states it was given, by the model's own forward."""
    members = [m for parent in model.modules() if isinstance(parent, nn.ModuleList) for m in parent]
    calls: list[Calls] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.is_floating_point():
            calls[-1].append((module, hidden.detach().clone()))

    hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in dict.fromkeys(members)]
    try:
        for sequence in sequences:
            calls.append([])
            model(**inputs(model, sequence))
    finally:
        for hook in hooks:
            hook.remove()
    orders = {tuple(id(module) for module, _ in one) for one in calls}
    if len(orders) > 1:
        return calls[0]
    return [(called[0][0], torch.cat([hidden for _, hidden in called])) for called in zip(*calls, strict=True)]


def decoder_layers(model: Any, calls: Calls) -> list[nn.Module]:
    """The list of modules that does most of the work in a forward pass on tokens, members that were not called too."""
    return max(lists_at_work(model, calls), key=weight_of, default=[])


def weight_of(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Weights in MLPs, and parameters, of a list of modules."""
    parts = sum(part.numel() for layer in layers for part in mlp_parts(layer).values())
    return parts, sum(p.numel() for layer in layers for p in layer.parameters())


def lists_at_work(model: Any, calls: Calls) -> list[list[nn.Module]]:
    """The outermost lists of modules of which some are called in a forward pass on tokens."""
    called = {id(module) for module, _ in calls}
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and any(id(member) in called for member in m)
    ]
    nested = {id(inner) for outer in lists for inner in outer.modules() if inner is not outer}
    return [list(one) for one in lists if id(one) not in nested]


# The checks.


def hidden_state_problems(model: Any, layers: list[nn.Module], calls: Calls, sequences: Tensor) -> list[str]:
    """Whether each layer is visited as often, in the order and with the hidden states of a plain forward pass."""
    decoder = find_decoder(model)
    problems = []
    if [id(layer.module) for layer in decoder.layers] != [id(layer) for layer in layers]:
        problems.append(
            f"{len(decoder.layers)} layers of {type(decoder.body).__name__} are not the {len(layers)} that run"
        )
        layers = [layer.module for layer in decoder.layers]
    visits: Calls = []

    def visit(run: Any) -> None:
        visits.append((run.layer.module, run.hidden.clone()))
        run.feed(keep=True)

    with torch.no_grad():
        run_layers(decoder, sequences, visit, batch_size=2)
    number = {id(layer): i for i, layer in enumerate(layers)}
    plain = [(number[id(module)], hidden) for module, hidden in calls if id(module) in number]
    ours = [(number[id(module)], hidden) for module, hidden in visits]
    if [i for i, _ in plain] != [i for i, _ in ours]:
        problems.append(f"layers run in the order {[i for i, _ in plain]}, are visited as {[i for i, _ in ours]}")
    for (i, right), (j, seen) in zip(plain, ours, strict=False):
        if i != j:
            break
        if right.shape != seen.shape or not torch.allclose(
            seen, right, rtol=1e-4, atol=1e-4 * float(right.abs().max())
        ):
            far = float((seen - right).abs().max() / right.abs().max()) if right.shape == seen.shape else seen.shape
            problems.append(f"hidden states before layer {i} differ from a plain forward pass by {far}")
            break
    return problems


def share_of_zeros(parameter: Tensor) -> float:
    return float((parameter == 0).float().mean())


def zero_problems(
    model: Any, layers: list[nn.Module], lists: list[list[nn.Module]], before: dict[str, Tensor]
) -> list[str]:
    """Whether every MLP matrix is half zeros, in the other lists that work on tokens too, and nothing else changed."""
    names = {id(module): name for name, module in model.named_modules()}
    left, parts = [], set()
    for i, layer in enumerate(layers):
        for path, part in mlp_parts(layer).items():
            parts.add(id(part))
            if not 0.4 <= share_of_zeros(part) <= 0.6:
                left.append(f"{i}.{path} ({share_of_zeros(part):.0%})")
    problems = [f"left dense: {', '.join(left[:6])}{' ...' if len(left) > 6 else ''}"] if left else []
    changed = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in parts and not torch.equal(parameter, before[name])
    ]
    others = [
        f"{names[id(member)]}.{path}"
        for one in lists
        for member in one
        if not any(member is layer for layer in layers)
        for path, part in mlp_parts(member).items()
        if share_of_zeros(part) < 0.4
    ]
    problems += [f"left dense elsewhere: {', '.join(others[:4])}"] if others else []
    return problems + ([f"changed: {', '.join(changed[:4])}"] if changed else [])


@torch.no_grad()
def mask_problems(
    dense: Any, pruned: Any, layers: Callable[[Any], list[nn.Module]], sequences: Tensor
) -> tuple[int, list[str]]:
    """Wanda's masks of the first and the last layer, computed anew from what a plain forward pass gives each Linear.

    Returns
    -------
    looked at : int
        Matrices.
    problems : list of str
    """
    given: dict[str, list[Tensor]] = {}
    hooks, found = [], {}
    of_dense, of_pruned = layers(dense), layers(pruned)
    for i in {0, len(of_dense) - 1}:
        modules = dict(of_dense[i].named_modules())
        for path in mlp_parts(of_dense[i]):
            if type(modules.get(path)) is nn.Linear:
                name = f"{i}.{path}"
                found[name] = (modules[path].weight, dict(of_pruned[i].named_modules())[path].weight)

                def see(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    del module
                    given.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

                hooks.append(modules[path].register_forward_pre_hook(see))
    try:
        for sequence in sequences:
            dense(**inputs(dense, sequence))
    finally:
        for hook in hooks:
            hook.remove()
    looked, problems = 0, []
    for name, (weight, after) in found.items():
        rows = torch.cat(given.get(name, [torch.zeros(0, weight.shape[1])]))
        if len(rows) != sequences.numel():
            continue  # An expert in a module of its own, or a layer that runs more than once.
        looked += 1
        if bad := against_wanda(weight, after == 0, rows):
            problems.append(f"{name}: {bad}")
    return looked, problems


def experts_in(layer: nn.Module) -> dict[str, Any]:
    """Modules that hold a matrix of all experts in one parameter, by path."""
    return {
        path: module
        for path, module in layer.named_modules()
        if isinstance(down := getattr(module, "down_proj", None), nn.Parameter) and down.ndim == 3
    }


@torch.no_grad()
def expert_problems(
    dense: Any, pruned: Any, layers: Callable[[Any], list[nn.Module]], sequences: Tensor
) -> tuple[int, list[str]]:
    """As :func:`mask_problems`, of experts that share a parameter, with tokens enough.

    What enters an expert's down is what the module puts out with an identity in place of down.
    """
    looked, problems = 0, []
    for i, (layer, after) in enumerate(zip(layers(dense), layers(pruned), strict=True)):
        for path, module in experts_in(layer).items():
            seen: list[tuple[Tensor, Tensor]] = []

            def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Any = seen) -> None:
                given = [*args, *kwargs.values()]
                if len(given) == 1:  # Llama 4: a row of tokens for each expert, those of other experts zero.
                    rows = given[0].view(len(module.down_proj), -1, given[0].shape[-1])
                    given = [rows.transpose(0, 1), (rows != 0).any(-1).T * torch.arange(1, len(rows) + 1) - 1]
                seen.append((given[0], given[1]))

            hook = module.register_forward_pre_hook(see, with_kwargs=True)
            for sequence in sequences:
                dense(**inputs(dense, sequence))
            hook.remove()
            if not seen or any(chosen.dtype != torch.int64 for _, chosen in seen):
                continue
            x, chosen = (torch.cat(list(one)) for one in zip(*seen, strict=True))
            for expert in range(module.down_proj.shape[0]):
                tokens = x[(chosen == expert).any(-1)]
                tokens = tokens[:, expert] if tokens.ndim == 3 else tokens
                if len(tokens) < 8:
                    continue
                products = _products(module, expert, tokens)
                up = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
                for name, rows in ((up, tokens), ("down_proj", products)):
                    weight, mask = getattr(module, name)[expert], getattr(after.get_submodule(path), name)[expert] == 0
                    if type(module).__name__.startswith(TRANSPOSED):
                        weight, mask = weight.T, mask.T
                    looked += 1
                    if bad := against_wanda(weight, mask, rows):
                        problems.append(f"{i}.{path}.{name}[{expert}]: {bad}")
    return looked, problems


def _products(module: Any, expert: int, tokens: Tensor) -> Tensor:
    held = {name: parameter.clone() for name, parameter in module.named_parameters() if "down" in name}
    hidden = tokens.shape[-1]
    parts = []
    for name in held:
        module.get_parameter(name).zero_()
    down = module.down_proj[expert].T if type(module).__name__.startswith(TRANSPOSED) else module.down_proj[expert]
    for start in range(0, down.shape[1], hidden):
        size = min(hidden, down.shape[1] - start)
        down.zero_()
        down[torch.arange(size), torch.arange(start, start + size)] = 1.0
        parts.append(_called(module, expert, tokens)[:, :size])
    for name, parameter in held.items():
        module.get_parameter(name).copy_(parameter)
    return torch.cat(parts, dim=1)


def _called(module: Any, expert: int, tokens: Tensor) -> Tensor:
    """What an expert alone puts out for tokens."""
    if len(inspect.signature(type(module).forward).parameters) > 2:
        return module(tokens, torch.full((len(tokens), 1), expert), torch.ones(len(tokens), 1))
    rows = tokens.new_zeros(len(module.down_proj), *tokens.shape)
    rows[expert] = tokens
    return module(rows.flatten(0, 1)).view_as(rows)[expert]


def against_wanda(weight: Tensor, mask: Tensor, rows: Tensor) -> str:
    """What speaks against a mask, "" if nothing: half of each row, with the least |W| * rms of its input, rows of x."""
    score = weight.double().abs() * rows.double().square().mean(0).sqrt()
    k = weight.shape[1] // 2
    if not (mask.sum(1) == k).all():
        return f"not {k} zeros in every row"
    threshold = score.sort(1).values[:, k - 1 : k + 1]
    wrong = (mask & (score > threshold[:, 1:] * 0.9999)) | (~mask & (score < threshold[:, :1] * 1.0001))
    near = threshold[:, 1:] < threshold[:, :1] * 1.0002
    bad = int((wrong & ~near).sum())
    return f"{bad} of {mask.numel()} weights against Wanda's score" if bad else ""


# A type.


@dataclass
class Case:
    """A dense model, and what a plain forward pass does in it; see :func:`prepared`."""

    model_type: str
    model: Any
    sequences: Tensor
    calls: Calls
    positions: list[str]

    def layers(self, model: Any) -> list[nn.Module]:
        """The decoder layers of a copy of the model."""
        return [model.get_submodule(name) for name in self.positions]

    def pruned(self, **chosen: Any) -> Any:
        """A pruned copy."""
        model = copy.deepcopy(self.model)
        prune(model, tiny_tokenizer(), Recipe(**{**SMALL, **chosen}), text(), batch_size=2)
        return model


_TEXT: list[str] = []


def text() -> str:
    """Calibration text."""
    if not _TEXT:
        _TEXT.append(load_text("builtin", "calibration")[:20_000])
    return _TEXT[0]


def prepared(model_type: str, model: Any) -> Case:
    """Raises what the model raises on tokens alone."""
    sequences = calibration_sequences(tiny_tokenizer(), BASE, text())
    calls = plain_calls(model, sequences)
    if not all(hidden.isfinite().all() for _, hidden in calls):
        raise ArithmeticError("NaN or Inf in a plain forward pass")
    names = {id(module): name for name, module in model.named_modules()}
    return Case(model_type, model, sequences, calls, [names[id(layer)] for layer in decoder_layers(model, calls)])


def examined(model_type: str, columns: Iterable[str] = COLUMNS) -> Result:
    """Build, prune and check a type, within the time limit."""
    result, started = Result(model_type), time.perf_counter()
    with time_limit(SECONDS), warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        try:
            _examine(result, columns)
        except TooLong:
            result.line = f"{result.line or result.outcome}: more than {SECONDS} s"
            result.outcome = "crash" if result.outcome != "not built" else "not built"
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def _examine(result: Result, columns: Iterable[str]) -> None:
    try:
        model = tiny_type(result.model_type)
    except Exception as error:
        result.line = said(error)
        return
    result.outcome = "crash"
    try:
        case: Case | None = prepared(result.model_type, model)
    except Exception as error:
        case, result.line = None, f"no forward pass on tokens alone: {said(error)}"
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers, calls_before = (case.layers(model), case.calls) if case else ([], [])
    result.layout = layout_of(layers or _longest_list(model))
    if case:
        case.model = copy.deepcopy(model)
    try:
        prune(model, tiny_tokenizer(), BASE, text(), batch_size=2)
    except NeuronRankError as error:
        result.outcome, result.line = "refused", first_line(error)
        if "\n" in str(error):
            result.outcome, result.problems = "wrong", ["a refusal of several lines"]
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        if changed:
            result.problems.append(f"refused after it had changed {changed[0]}")
        return
    except Exception as error:
        result.line = said(error)
        return
    if case is None:
        found = [layer.module for layer in find_decoder(model).layers]
        lists = [
            list(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and not re.search(r"vision|visual|image|audio|encoder", name)
        ]
        result.problems = zero_problems(model, found, lists, before)
        result.outcome = "wrong" if result.problems else "pruned"
        return
    result.outcome = "wrong"
    calls = plain_calls(case.model, case.sequences)
    result.problems += hidden_state_problems(case.model, case.layers(case.model), calls, case.sequences)
    result.problems += zero_problems(model, layers, lists_at_work(model, calls_before), before)
    dense = case.pruned(propagate="dense")
    looked, problems = mask_problems(case.model, dense, case.layers, case.sequences)
    more, experts = expert_problems(case.model, dense, case.layers, case.sequences)
    result.problems += [*problems, *experts]
    result.columns["masks"] = f"{looked} + {more}"
    if result.problems:
        return
    result.outcome = "pruned"
    for name in columns:
        try:
            result.columns[name] = _CHECKS[name](case, model)
        except NeuronRankError as error:
            result.columns[name] = f"refused: {first_line(error)}"
        except Exception as error:
            result.columns[name] = f"crash: {said(error)}"


def _longest_list(model: Any) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=weight_of, default=[]))


def said(error: BaseException) -> str:
    """An exception in a line, with where it came from."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)[:160]} ({Path(where.filename).name}:{where.lineno})"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TooLong

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# The columns.


@torch.no_grad()
def logits(model: Any, sequences: Tensor) -> Tensor:
    return model(**inputs(model, sequences[0])).logits


def _two_of_four(case: Case, _: Any) -> str:
    model = case.pruned(sparsity_type="2:4")
    for i, layer in enumerate(case.layers(model)):
        for path, part in mlp_parts(layer).items():
            rows = part.T if isinstance(layer.get_submodule(path) if part.ndim == 2 else None, Conv1D) else part
            if part.ndim == 3 and type(layer.get_submodule(path.rpartition(".")[0])).__name__.startswith(TRANSPOSED):
                rows = part.transpose(1, 2)
            if not ((rows == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all():
                return f"wrong: {i}.{path} is not 2:4"
    return "yes"


@torch.no_grad()
def _gradual(case: Case, plain: Any) -> str:
    refitted = case.pruned(update="gradual")
    outputs = []
    for model in (case.model, plain, refitted):
        seen: list[Tensor] = []
        first = find_decoder(model).layers[0]
        module = first.mlp.module if first.experts is None else first.experts.module
        hook = module.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for sequence in case.sequences:
            model(**inputs(model, sequence))
        hook.remove()
        outputs.append(torch.cat([x.flatten() for x in seen]))
    without, with_update = (float((x - outputs[0]).norm() / outputs[0].norm()) for x in outputs[1:])
    if with_update > without:
        return f"wrong: error {without:.3f} without, {with_update:.3f} with"
    bad = [
        f"{i}.{path}"
        for i, layer in enumerate(case.layers(refitted))
        for path, part in mlp_parts(layer).items()
        if not 0.4 <= share_of_zeros(part) <= 0.6
    ]
    return f"wrong: {bad[0]} left dense" if bad else "yes"


def _neurons(case: Case, _: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        if (how := _loads(case.model, Path(folder))) != "loads as the same model":
            return f"- (transformers saves the dense one so that it {how})"
    model = case.pruned(method="neuronrank_wanda", sparsity_type="neurons", sparsity_ratio=0.25)
    for i, (layer, was) in enumerate(zip(case.layers(model), case.layers(case.model), strict=True)):
        for (path, part), old in zip(mlp_parts(layer).items(), mlp_parts(was).values(), strict=True):
            if 4 * part.numel() != 3 * old.numel():
                return f"wrong: {i}.{path} has {tuple(part.shape)} of {tuple(old.shape)}"
    here = logits(model, case.sequences)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
    lost = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if lost:
        return f"wrong: {lost[0]} does not load"
    if not torch.equal(logits(again.eval(), case.sequences), here):
        return "wrong: other logits once loaded"
    return "yes"


def _attention(case: Case, _: Any) -> str:
    model = case.pruned(include_attention=True)
    for i, layer in enumerate(case.layers(model)):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            asked = isinstance(module, nn.Linear) and re.fullmatch(r"([qkvo]|out)_proj", name) and "attn" in path
            if asked and not 0.4 <= share_of_zeros(module.weight) <= 0.6:
                return f"wrong: {i}.{path} has {share_of_zeros(module.weight):.0%} zeros"
    return "yes" if logits(model, case.sequences).isfinite().all() else "wrong: logits are not finite"


def _streamed(case: Case, plain: Any) -> str:
    if base(case.model_type) not in CAUSAL:
        return "-"
    with tempfile.TemporaryDirectory() as temporary:
        source, right, out = (Path(temporary, name) for name in ("source", "right", "out"))
        for model, place in ((case.model, source), (plain, right)):
            model.save_pretrained(place)
        tiny_tokenizer().save_pretrained(source)
        Path(temporary, "text.txt").write_text(text())
        job = Job(str(source), str(Path(temporary, "text.txt")), save=str(out), device="cpu", batch_size=2)
        notes = run_prune(job, BASE).notes
        original, expected, written = map(_tensors, (source, right, out))
        problem = "".join(f"changed: {note}" for note in notes if "not as the source does" in note)
        if not problem and (lost := sorted(original.keys() - written.keys())):
            problem = f"wrong: {lost[0]} is gone"
        elif not problem and expected.keys() != written.keys():
            problem = f"wrong: {sorted(expected.keys() ^ written.keys())[0]} is in one of both"
        for name in expected.keys() & written.keys():
            tensor, other = expected[name], written[name]
            if tensor.shape != other.shape or tensor.dtype != other.dtype or not torch.equal(tensor, other):
                return f"wrong: {name} differs from the prune in memory"
        return f"{problem} ({_loads(plain, out)})" if problem else "yes"


def _loads(plain: Any, out: Path) -> str:
    """Whether a folder loads as the model that was pruned in memory."""
    try:
        model, info = type(plain).from_pretrained(out, output_loading_info=True)
    except Exception as error:
        return f"does not load: {said(error)}"
    lost = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if lost:
        return f"{lost[0]} is lost in loading"
    state = model.state_dict()
    same = all(torch.equal(state[name], x) for name, x in plain.state_dict().items())
    return "loads as the same model" if same else "loads as another model"


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x.clone() for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


_CHECKS: dict[str, Callable[[Case, Any], str]] = {
    "2:4": _two_of_four,
    "gradual": _gradual,
    "neurons": _neurons,
    "attention": _attention,
    "streamed": _streamed,
}


# The page.


def group(result: Result) -> str:
    """What a type that is refused is grouped by: the names of its MLP's matrices, or what is in the way."""
    if "depend on the text" in result.line:
        return "layers that get arguments which depend on the text"
    if "experts differently" in result.line:
        return "experts in another layout"
    depth = 2 if any(re.search(r"dense$", part) for part in result.layout) else 1
    return ", ".join(sorted({".".join(part.split(".")[-depth:]) for part in result.layout})) or "no MLP found"


def groups(results: list[Result]) -> list[tuple[str, list[str]]]:
    """Types that are refused, by group, the largest first."""
    found: dict[str, list[str]] = {}
    for result in results:
        if result.outcome == "refused":
            found.setdefault(group(result), []).append(result.model_type)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


_REMARKED = ("changed", "wrong", "crash")


def page(results: list[Result], day: date) -> str:
    """The results as Markdown."""
    outcomes = Counter((result.outcome, "+" in result.model_type) for result in results)
    types = sum("+" not in result.model_type for result in results)
    lines = [
        "# Model types",
        "",
        f"Measured {day} with transformers {transformers.__version__} by `python tests/stress/model_types.py`: a tiny",
        f"random model of each of {types} types that read text (where one could be built), and of some variants,",
        "pruned by Wanda in memory.",
        "",
        "- *pruned*: every MLP matrix is half zeros, nothing else has changed, each layer saw the hidden states of a",
        "  plain forward pass, and the masks of ordinary linear layers in the first and the last layer, and of",
        "  experts, are Wanda's. Types that do not run on tokens alone have empty columns: only their zeros were",
        "  checked.",
        "- *refused*: one line says why. The model is as it was, unless the table says otherwise.",
        "- *wrong*: one of these does not hold; the last column says which. *crash*: an error that is not a refusal.",
        "- *not built*: the sweep has no tiny model of it.",
        "- Columns: 2:4 sparsity; `--update gradual`; `--sparsity_type neurons`; `--nr-include-attention`; and a run",
        "  with `--save`: the same bits as in memory, under the names of the checkpoint (*changed*: the result says",
        "  which tensors have other names or shapes). A dash: not applicable.",
        "",
        "| outcome | types | variants |",
        "| --- | --- | --- |",
        *[f"| {name} | {outcomes[name, False]} | {outcomes[name, True]} |" for name in OUTCOMES],
        "",
        "Of the pruned ones, variants included:",
        "",
        "| | yes | refused | changed | wrong | crash |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    kept = [result for result in results if result.outcome == "pruned" and result.columns]
    for name in COLUMNS:
        ends = Counter(result.columns.get(name, "-").partition(":")[0] for result in kept)
        counts = [str(ends[end]) for end in ("yes", "refused", "changed", "wrong", "crash")]
        lines.append(f"| {name} | " + " | ".join(counts) + " |")
    lines += ["", "## Refused, by layout of the MLP", ""]
    lines += [
        "A type whose matrices are in a known layout is refused for another reason, which the table below gives.",
        "",
    ]
    lines += ["| matrices | types | |", "| --- | --- | --- |"]
    lines += [f"| {name} | {len(types)} | {', '.join(types)} |" for name, types in groups(results)]
    lines += [
        "",
        "## By type",
        "",
        "`type+part` is a type with a part that its configuration leaves out by default.",
        "",
        "| type | outcome | " + " | ".join(COLUMNS) + " | |",
        "| --- " * (len(COLUMNS) + 3) + "|",
    ]
    for result in results:
        cells = [result.columns.get(name, "").partition(":")[0] for name in COLUMNS]
        remarks = [*result.problems, *([] if result.outcome == "pruned" and not result.line else [result.line])]
        remarks += [f"{name} {value}" for name, value in result.columns.items() if value.startswith(_REMARKED)]
        remark = "; ".join(filter(None, remarks)).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{result.model_type}` | {result.outcome} | " + " | ".join(cells) + f" | {remark} |")
    return "\n".join(lines) + "\n"


@click.command(context_settings={"show_default": True})
@click.option("--only", multiple=True, metavar="TYPE", help="May be given several times; all by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the lines go besides stdout.")
@click.option("--page", "page_file", type=click.Path(path_type=Path), help="Write the page of all results.")
@click.option("--from", "from_file", type=click.Path(path_type=Path), help="Take over results from such lines.")
def main(only: tuple[str, ...], json_file: Path | None, page_file: Path | None, from_file: Path | None) -> None:
    """Prune a tiny model of every type."""
    torch.set_num_threads(1)
    known = [Result(**json.loads(line)) for line in from_file.read_text().splitlines()] if from_file else []
    results = {result.model_type: result for result in known}
    for model_type in only or ([] if known else sorted([*TYPES, *VARIANTS])):
        results[model_type] = result = examined(model_type)
        line = json.dumps(asdict(result))
        click.echo(line)
        if json_file:
            with json_file.open("a") as file:
                file.write(line + "\n")
    ordered = [results[name] for name in sorted(results)]
    if page_file:
        page_file.write_text(page(ordered, date.today()))
    click.echo(dict(Counter(result.outcome for result in ordered)), err=True)
    sys.exit(any(result.outcome in ("wrong", "crash") for result in ordered))


if __name__ == "__main__":
    main()
