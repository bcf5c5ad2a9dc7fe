"""Finds decoder layers, gated MLPs and attention projections by structure, not by class name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from neuronrank_core.errors import InputError, MissingStatisticsError, UnsupportedModelError
from neuronrank_torch.model.experts import find_experts

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Decoder:
    """The part of a model that NeuronRank works on.

    Parameters
    ----------
    body : nn.Module
        The module whose forward calls the layers one after another (``model.model`` in most families).
    layers : list of nn.Module
        Its decoder layers.
    """

    body: nn.Module
    layers: list[nn.Module]


def _holders(layer: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The submodules of a layer that have linear layers of all these names."""
    return [m for m in layer.modules() if all(isinstance(getattr(m, name, None), nn.Linear) for name in names)]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of a transformers model.

    Raises
    ------
    MissingStatisticsError
        If no list of layers with gated MLPs or experts is there, or one of its layers has neither.
    UnsupportedModelError
        If a layer has several, or experts that cannot be pruned.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    for body in model.modules():
        if embeddings is not None and all(module is not embeddings for module in body.modules()):
            continue  # Layers that see pictures or sound, not tokens.
        layers = getattr(body, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            continue
        if not any(_holders(layer, MLP_PROJECTIONS) or find_experts(layer, i) for i, layer in enumerate(layers)):
            continue
        for index in range(len(layers)):
            _check(layers[index], index)
        return Decoder(body, list(layers))
    raise MissingStatisticsError(0, f"{type(model).__name__} has no decoder layers with a gated MLP")


def _check(layer: nn.Module, index: int) -> None:
    """Refuse a layer of which nothing, or only a part, could be pruned."""
    if find_experts(layer, index) is None:
        gated_mlp(layer, index)
    elif _holders(layer, MLP_PROJECTIONS):
        raise UnsupportedModelError(
            f"layer {index} ({type(layer).__name__}) has a shared expert besides the routed ones",
            hint="only mixtures of routed experts alone can be pruned yet",
        )


def gated_mlp(layer: nn.Module, index: int) -> nn.Module:
    """The gated MLP of a layer; raises MissingStatisticsError where there is none, InputError where there are more."""
    if find_experts(layer, index) is not None:
        raise UnsupportedModelError(
            f"layer {index} ({type(layer).__name__}) is a mixture of experts", hint="only `prune` works with those yet"
        )
    mlps = _holders(layer, MLP_PROJECTIONS)
    if not mlps:
        raise MissingStatisticsError(index, f"{type(layer).__name__} has no gated MLP")
    if len(mlps) > 1:
        raise UnsupportedModelError(
            f"layer {index} ({type(layer).__name__}) has {len(mlps)} gated MLPs",
            hint="mixtures of experts can be pruned where transformers fuses the experts, as in Mixtral",
        )
    return mlps[0]


def activation_of(layer: nn.Module, index: int) -> Callable[[Tensor], Tensor]:
    """Activation function of a layer's gated MLP; raises InputError where transformers' usual name is not there."""
    mlp = gated_mlp(layer, index)
    activation: Callable[[Tensor], Tensor] | None = getattr(mlp, "act_fn", None)
    if activation is None:
        raise InputError(
            f"layer {index}: {type(mlp).__name__} has no activation function under the name `act_fn`",
            hint="this family of models cannot be pruned yet",
        )
    return activation


def prunable_linears(layer: nn.Module, index: int, *, include_attention: bool = False) -> dict[str, nn.Linear]:
    """Linear layers to prune, by short name (``gate_proj``, ...).

    Raises
    ------
    MissingStatisticsError
        If the layer has no gated MLP.
    InputError
        If attention is asked for and the layer has no q/k/v/o projections.
    """
    mlp = gated_mlp(layer, index)
    found = {name: getattr(mlp, name) for name in MLP_PROJECTIONS}
    return found | attention_linears(layer, index) if include_attention else found


def attention_linears(layer: nn.Module, index: int) -> dict[str, nn.Linear]:
    """Attention projections of a layer by short name; raises InputError where it has none."""
    attention = next(iter(_holders(layer, ATTENTION_PROJECTIONS)), None)
    if attention is None:
        raise InputError(
            f"layer {index} ({type(layer).__name__}) has no q/k/v/o projections", hint="use --nr-skip-attention"
        )
    return {name: getattr(attention, name) for name in ATTENTION_PROJECTIONS}


def reported_linears(layer: nn.Module, index: int, *, include_attention: bool = False) -> dict[str, nn.Linear]:
    """Linear layers to prune, by their name in a report: ``gate_proj``, or ``experts.3.gate_proj`` of an expert."""
    experts = find_experts(layer, index)
    if experts is None:
        return prunable_linears(layer, index, include_attention=include_attention)
    return dict(experts.named_linears()) | (attention_linears(layer, index) if include_attention else {})


def has_attention(layer: nn.Module) -> bool:
    """Whether a layer has q/k/v/o projections to prune."""
    return bool(_holders(layer, ATTENTION_PROJECTIONS))


def untied_head(model: nn.Module) -> nn.Linear:
    """The language-model head.

    Raises
    ------
    InputError
        If there is none, or if it shares its weight with the embeddings, which pruning would damage.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise InputError(f"{type(model).__name__} has no lm_head to prune", hint="leave out --nr-prune-lm-head")
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise InputError("the lm_head is tied to the embeddings", hint="leave out --nr-prune-lm-head")
    return head
