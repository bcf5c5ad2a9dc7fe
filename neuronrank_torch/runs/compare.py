"""Two models side by side: which weights are zero in both, size, perplexity, predictions and speed."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from neuronrank_core.measures import Divergence
from neuronrank_core.overlap import Overlap, overlap
from neuronrank_torch.evaluation.perplexity import Perplexity
from neuronrank_torch.evaluation.speed import Speed, SpeedUp, compare_speed
from neuronrank_torch.model.blocks import Block, Mlp, Projection
from neuronrank_torch.model.open import Dtype, load_model, open_model
from neuronrank_torch.model.streaming import HEAD, REST, StreamedModel, Unit
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.pruning.scope import PRUNED
from neuronrank_torch.runs.evaluate import measure_both
from neuronrank_torch.runs.job import Evaluation

#: Number of matrices that a note names.
LISTED = 4


@dataclass(frozen=True)
class CompareJob:
    """What to compare.

    Parameters
    ----------
    models : (str, str)
        As :func:`neuronrank_torch.model.open.open_model` takes them.
    evaluation : Evaluation, optional
        How to measure perplexity; not measured by default.
    speed_tokens : int, optional
        Tokens per sequence for measuring speed; not measured by default. Both models are then in memory at once.
    device, dtype, batch_size
        As in :class:`neuronrank_torch.runs.job.Job`.
    """

    models: tuple[str, str]
    evaluation: Evaluation | None = None
    speed_tokens: int | None = None
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int = 1


@dataclass(frozen=True)
class LayerOverlap:
    """Overlap in one layer, or the output head.

    Parameters
    ----------
    layer : int or str
        Number of the layer, from 0, or ``lm_head``.
    modules : dict of Overlap
        By role, such as ``gate_proj``, whatever the model calls it; experts are added up. Only roles that at least one
        of the models has pruned.
    """

    layer: int | str
    modules: dict[str, Overlap]


@dataclass(frozen=True)
class ModelFigures:
    """Size and quality of one model.

    Parameters
    ----------
    model : str
        The model, as it was named.
    bytes : int
        Size of its weight files, in bytes.
    parameters : int
        Number of parameters.
    nonzero : int
        Number of parameters that are not zero.
    perplexity : Perplexity or None
        Null without ``--eval``.
    memory : int
        Size of its parameters in memory, in bytes.
    speed : Speed or None
        Null without ``--speed``.
    """

    model: str
    bytes: int
    parameters: int
    nonzero: int
    perplexity: Perplexity | None = None
    memory: int = 0
    speed: Speed | None = None


@dataclass(frozen=True)
class CompareResult:
    """Result of ``neuronrank compare``.

    Parameters
    ----------
    models : tuple of ModelFigures
        The first and the second model.
    layers : tuple of LayerOverlap
        Layers with modules that at least one of the models has pruned.
    modules : dict of Overlap
        Sums over the layers, by role.
    total : Overlap or None
        Sums over all modules; null if there are none.
    divergence : Divergence or None
        How far the predictions of the second model are from those of the first; null without ``--eval``, and if they
        cannot be compared.
    speed_up : dict of SpeedUp or None
        How many times as fast the second model is, for ``prefill`` and ``decode``; null without ``--speed``.
    notes : tuple of str
        What could not be compared.
    schema : int
        Version of this format.
    """

    models: tuple[ModelFigures, ...]
    layers: tuple[LayerOverlap, ...]
    modules: dict[str, Overlap]
    total: Overlap | None
    divergence: Divergence | None
    speed_up: dict[str, SpeedUp] | None
    notes: tuple[str, ...]
    schema: int = 2


def run_compare(job: CompareJob, progress: Progress = silent) -> CompareResult:
    """Compare two models. One layer of each is in memory at a time.

    Returns
    -------
    CompareResult

    Raises
    ------
    NeuronRankError
        If a model or the text cannot be used.
    """
    opened = []
    for spec in job.models:
        progress(f"opening {spec}", 0, 1, "models")
        opened.append(open_model(spec, dtype=job.dtype, device=job.device))
    pair = _Pair([streamed for streamed, _, _ in opened])
    layers = pair.overlaps(progress)
    modules = {
        name: sum((other.modules[name] for other in layers if name in other.modules), Overlap())
        for layer in layers
        for name in layer.modules
    }
    perplexities: Sequence[Perplexity | None] = (None, None)
    divergence = None
    if job.evaluation is not None:
        how: dict[str, Any] = {name: getattr(job, name) for name in ("device", "dtype", "batch_size")}
        perplexities, divergence, notes = measure_both(job.models, job.evaluation, **how, progress=progress)
        pair.notes += notes
    speeds: Sequence[Speed | None] = (None, None)
    speed_up = None
    if job.speed_tokens is not None:
        whole = [load_model(spec, dtype=job.dtype, device=job.device)[0] for spec in job.models]
        speeds, speed_up = compare_speed(whole, job.speed_tokens, job.batch_size, progress)
    return CompareResult(
        models=tuple(
            ModelFigures(
                spec,
                source.weight_bytes(),
                sum(p.numel() for p in streamed.model.parameters()),
                nonzero,
                perplexity,
                sum(p.numel() * p.element_size() for p in streamed.model.parameters()),
                speed,
            )
            for spec, (streamed, _, source), nonzero, perplexity, speed in zip(
                job.models, opened, pair.nonzero, perplexities, speeds, strict=True
            )
        ),
        layers=layers,
        modules=modules,
        total=sum(modules.values(), Overlap()) if modules else None,
        divergence=divergence,
        speed_up=speed_up,
        notes=(*(note for _, _, source in opened for note in source.notes), *pair.notes),
    )


class _Pair:
    """Two opened models, whose parts are read once, in order."""

    def __init__(self, models: Sequence[StreamedModel]) -> None:
        self.models = models
        self.nonzero = [0, 0]
        self.notes: list[str] = []
        a, b = (len(model.decoder.layers) for model in models)
        self.same_depth = a == b
        if not self.same_depth:
            self.notes.append(f"the models have {a} and {b} layers, so their weights are not compared")
        #: Matrices that cannot be compared, by the reason.
        self.apart: dict[str, set[str]] = {
            reason: set()
            for reason in ("their shapes differ", "only one of the models has them", "their numbers of experts differ")
        }
        self.parameters = [
            {name for name, _ in model.model.named_parameters(remove_duplicate=False)} for model in models
        ]

    def overlaps(self, progress: Progress) -> tuple[LayerOverlap, ...]:
        """Overlap of the zeros by layer and role. Also counts the weights that are not zero."""
        found: dict[Unit, dict[str, Overlap]] = {}
        units = list(dict.fromkeys(unit for model in self.models for unit in model.units))
        for done, unit in enumerate(units):
            progress("comparing weights", done, len(units), "parts")
            with ExitStack() as stack:
                for side, model in enumerate(self.models):
                    if unit != REST:  # The rest is always in memory.
                        stack.enter_context(model.resident(unit))
                    tensors = model.tensors(unit) if unit in model.units else {}
                    counted = self.parameters[side]  # Not buffers.
                    self.nonzero[side] += sum(int(t.count_nonzero()) for name, t in tensors.items() if name in counted)
                if self.same_depth and unit != REST:
                    found[unit] = self._overlap(unit)
        for reason, names in self.apart.items():
            if names:
                more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
                listed = ", ".join(sorted(names)[:LISTED])
                self.notes.append(f"not compared because {reason}: {listed}{more}")
        pruned = {n for m in found.values() for n, o in m.items() if max(o.zeros) >= PRUNED * o.size}
        layers = (LayerOverlap(i, {n: o for n, o in m.items() if n in pruned}) for i, m in found.items())
        return tuple(layer for layer in layers if layer.modules)

    def _overlap(self, unit: Unit) -> dict[str, Overlap]:
        """Overlap in a layer or the head by role; experts are added up."""
        blocks = [_blocks(model, unit) for model in self.models]
        experts = [sum(map(_is_expert, of_model)) for of_model in blocks]
        if all(experts) and len(set(experts)) > 1:  # They are numbered anew after a removal.
            self.apart["their numbers of experts differ"].add(f"the experts of layer {unit}")
            blocks = [[block for block in of_model if not _is_expert(block)] for of_model in blocks]
        a, b = (
            {(block.prefix, role): p for block in of_model for role, p in block.projections.items()}
            for of_model in blocks
        )
        self.apart["only one of the models has them"] |= {prefix + role for prefix, role in a.keys() ^ b.keys()}
        found: dict[str, Overlap] = {}
        for prefix, role in (key for key in a if key in b):
            zero_a, zero_b = (projections[prefix, role].weight == 0 for projections in (a, b))
            if zero_a.shape == zero_b.shape:
                found[role] = found.get(role, Overlap()) + overlap(zero_a, zero_b)
            else:
                self.apart["their shapes differ"].add(prefix + role)
        return found


def _is_expert(block: Block) -> bool:
    return isinstance(block, Mlp) and block.expert is not None


def _blocks(model: StreamedModel, unit: Unit) -> list[Block]:
    """The blocks of a layer, or the head; none if the model does not have it."""
    if unit not in model.units:
        return []
    if unit == HEAD:
        head = model.model.get_output_embeddings()
        return [Block(HEAD, head, {HEAD: Projection(head)})]
    layer = model.decoder.layers[int(unit)]
    return [*layer.mlps, *([layer.attention] if layer.attention else [])]
