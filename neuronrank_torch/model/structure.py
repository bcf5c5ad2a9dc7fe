"""The prunable parts of a model: decoder layers with their MLPs and attention, found by structure, not by class.

:func:`find_decoder` resolves the structure once; all other code works on the objects that it returns.
"""

from dataclasses import dataclass

from torch import nn

from neuronrank_core.errors import InputError, MissingStatisticsError, UnsupportedModelError
from neuronrank_torch.model.blocks import ATTENTION_PROJECTIONS, Block, Mlp, Projection
from neuronrank_torch.model.experts import Experts, find_experts
from neuronrank_torch.model.families import LAYOUTS


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer and its prunable parts.

    Parameters
    ----------
    index : int
        Index of the layer, from 0.
    module : nn.Module
    mlps : tuple of Mlp
        Its MLP or, in a mixture of experts, each routed expert.
    attention : Block, optional
        Its q/k/v/o projections, if present.
    experts : Experts, optional
        The module that runs the routed experts, in a mixture of experts.
    """

    index: int
    module: nn.Module
    mlps: tuple[Mlp, ...]
    attention: Block | None = None
    experts: Experts | None = None

    @property
    def mlp(self) -> Mlp:
        """The MLP of the layer; raises UnsupportedModelError for a mixture of experts."""
        if self.experts is not None:
            raise UnsupportedModelError(
                f"layer {self.index} ({type(self.module).__name__}) is a mixture of experts",
                hint="only `prune` supports mixtures of experts yet",
            )
        return self.mlps[0]

    def blocks(self, *, include_attention: bool = False) -> tuple[Block, ...]:
        """The blocks to prune in this layer: its MLPs, and attention if requested.

        Raises
        ------
        InputError
            If attention is requested and the layer has no q/k/v/o projections.
        """
        if not include_attention:
            return self.mlps
        if self.attention is None:
            raise InputError(
                f"layer {self.index} ({type(self.module).__name__}) has no q/k/v/o projections",
                hint="use --nr-skip-attention",
            )
        return (*self.mlps, self.attention)


@dataclass(frozen=True, eq=False)
class Decoder:
    """The part of a model that NeuronRank works on.

    Parameters
    ----------
    body : nn.Module
        The module whose forward calls the layers in order (``model.model`` in most families).
    layers : list of Layer
    """

    body: nn.Module
    layers: list[Layer]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of a transformers model and the prunable parts of its layers.

    Parameters
    ----------
    model : transformers model

    Returns
    -------
    Decoder

    Raises
    ------
    MissingStatisticsError
        If the model has no list of layers with gated MLPs or experts, or one of the layers has neither.
    UnsupportedModelError
        If a layer has several gated MLPs, or experts that cannot be pruned.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    for body in model.modules():
        if embeddings is not None and all(module is not embeddings for module in body.modules()):
            continue  # Layers of an image or audio encoder.
        layers = getattr(body, "layers", None)
        if isinstance(layers, nn.ModuleList) and any(
            _find_mlps(m, i) or find_experts(m, i) for i, m in enumerate(layers)
        ):
            return Decoder(body, [resolve_layer(module, index) for index, module in enumerate(layers)])
    raise MissingStatisticsError(0, f"{type(model).__name__} has no decoder layers with a gated MLP")


def resolve_layer(module: nn.Module, index: int) -> Layer:
    """Find the prunable parts of a layer; raises an error if its MLP cannot be pruned as a whole."""
    experts, mlps = find_experts(module, index), _find_mlps(module, index)
    if experts is not None:
        if mlps:
            raise UnsupportedModelError(
                f"layer {index} ({type(module).__name__}) has a shared expert besides the routed ones",
                hint="only mixtures without shared experts can be pruned yet",
            )
        mlps = experts.mlps(index)
    elif not mlps:
        raise MissingStatisticsError(index, f"{type(module).__name__} has no gated MLP")
    elif len(mlps) > 1:
        raise UnsupportedModelError(
            f"layer {index} ({type(module).__name__}) has {len(mlps)} gated MLPs",
            hint="mixtures of experts can be pruned where transformers fuses the experts, as in Mixtral",
        )
    return Layer(index, module, mlps, _find_attention(module, index), experts)


def _find_mlps(layer: nn.Module, index: int) -> tuple[Mlp, ...]:
    found = (layout.find(module, index) for module in layer.modules() for layout in LAYOUTS.values())
    return tuple(mlp for mlp in found if mlp is not None)


def _find_attention(layer: nn.Module, index: int) -> Block | None:
    for module in layer.modules():
        linears = {name: getattr(module, name, None) for name in ATTENTION_PROJECTIONS}
        projections = {n: Projection(linear) for n, linear in linears.items() if isinstance(linear, nn.Linear)}
        if len(projections) == len(ATTENTION_PROJECTIONS):
            return Block(index, module, projections)
    return None


def untied_head(model: nn.Module) -> Block:
    """The language-model head.

    Raises
    ------
    InputError
        If there is none, or it shares its weight with the embeddings, which pruning would change.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        raise InputError(f"{type(model).__name__} has no lm_head to prune", hint="leave out --nr-prune-lm-head")
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise InputError("the lm_head is tied to the embeddings", hint="leave out --nr-prune-lm-head")
    return Block("lm_head", head, {"lm_head": Projection(head)})
