"""The prunable parts of a model: decoder layers with their MLPs and attention, found by structure, not by class.

:func:`find_decoder` resolves the structure once; all other code works on the objects that it returns.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from neuronrank_core.errors import InputError, MissingStatisticsError, UnsupportedModelError
from neuronrank_core.recipe import Recipe
from neuronrank_torch.model.attention import Attention
from neuronrank_torch.model.blocks import ATTENTION_PROJECTIONS, Block, Mlp, Projection
from neuronrank_torch.model.experts import Experts, find_experts
from neuronrank_torch.model.families import LAYOUTS
from neuronrank_torch.model.families.layout import at_path

#: Names of modules that route or normalise tokens: they may have the matrices of a plain MLP.
_ROUTER_OR_NORM = re.compile(r"gate(\.|$)|router|norm", re.IGNORECASE)
#: Names of modules in an MLP; and of those beside it, which also attend or embed.
_MLP_PART = re.compile(r"mlp|ffn|feed_?forward|expert|\bfc\d|\bdense", re.IGNORECASE)
_NO_MLP_PART = re.compile(_ROUTER_OR_NORM.pattern + "|attn|attention|mamba|mixer|conv|embed", re.IGNORECASE)
#: Names of classes of MLPs.
_MLP_CLASS = re.compile(r"mlp|moe|experts|feed_?forward|ffn", re.IGNORECASE)
#: Paths of the list of layers, from the module that takes the tokens.
LAYERS = ("layers", "h", "blocks", "encoder.layer")
#: Names of encoders whose layers read no text, or text only together with pictures.
_OTHER_INPUT = re.compile(r"vision|visual|image|video|audio|speech|tower|perceiver|qformer", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer and its prunable parts.

    Parameters
    ----------
    index : int
        Index of the layer, from 0.
    module : nn.Module
    mlps : tuple of Mlp
        Its MLP or, in a mixture of experts, each routed expert, and a shared expert if it has one. Empty in a layer
        of a hybrid model that only mixes tokens.
    attention : Attention, optional
        Its q/k/v/o projections, if present once.
    experts : Experts, optional
        The module that runs the routed experts, in a mixture of experts.
    """

    index: int
    module: nn.Module
    mlps: tuple[Mlp, ...]
    attention: Attention | None = None
    experts: Experts | None = None

    @property
    def mlp(self) -> Mlp:
        """The MLP of the layer; raises UnsupportedModelError for a mixture of experts and a layer without an MLP."""
        if not self.mlps:
            raise UnsupportedModelError(
                f"layer {self.index} ({type(self.module).__name__}) has no MLP",
                hint="only `prune` supports models that have such layers",
            )
        if self.experts is not None:
            raise UnsupportedModelError(
                f"layer {self.index} ({type(self.module).__name__}) is a mixture of experts",
                hint="this needs the neurons of one MLP per layer; prune, collect, compare and eval take mixtures",
            )
        return self.mlps[0]

    def output_of(self, mlp: Mlp) -> nn.Module:
        """The module whose output is that of an MLP; for a routed expert, the sum over the experts."""
        if mlp.expert is not None and self.experts is not None:
            return cast(nn.Module, self.experts.module)
        return mlp.projections["down_proj"].module

    def blocks(self, *, include_attention: bool = False) -> tuple[Block, ...]:
        """The blocks to prune in this layer: its MLPs, and attention if requested.

        Raises
        ------
        InputError
            If attention is requested and the layer has no q/k/v/o projections, or several times.
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
    model : nn.Module
        The whole model. It may pass its body arguments of its own, such as attention masks.
    body : nn.Module
        The module whose forward calls the layers in order (``model.model`` in most families).
    layers : list of Layer
    """

    model: nn.Module
    body: nn.Module
    layers: list[Layer]

    @property
    def gated(self) -> bool:
        """Whether an MLP has a gate; without one, all signals are the same."""
        return any(mlp.gated for layer in self.layers for mlp in layer.mlps)

    @property
    def experts(self) -> bool:
        """Whether a layer has routed experts."""
        return any(layer.experts is not None for layer in self.layers)

    def measured(self, recipe: Recipe) -> Recipe:
        """The recipe with the signal that is measured in this model."""
        first = next(mlp for layer in self.layers for mlp in layer.mlps)
        return recipe if self.gated or recipe.removes_experts else replace(recipe, signal=first.signal(recipe.signal))


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
        If the model has no list of layers with MLPs or experts in a known layout, or one of the layers has an MLP in
        another.
    UnsupportedModelError
        If a layer has several MLPs, experts that cannot be pruned or an MLP matrix in an unknown layout, if layers
        share an MLP, or if there is a second stack of layers with MLPs.
    """
    embeddings = None
    with suppress(AttributeError, NotImplementedError):  # Transformers raises the latter where it cannot find them.
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    stacks = {name: body for name, body in model.named_modules() if _has_layers(body) and not _OTHER_INPUT.search(name)}
    reading = [body for body in stacks.values() if embeddings is None or any(m is embeddings for m in body.modules())]
    if not reading:
        raise MissingStatisticsError(
            0, f"{type(model).__name__} is not supported: it has no decoder layers with MLPs in a known layout"
        )
    body: Any = reading[0]
    others = [name for name, other in stacks.items() if other is not body]
    if others:
        raise UnsupportedModelError(
            f"{type(model).__name__} has another stack of layers with MLPs, which would stay dense: {others[0]}"
        )
    layers = [resolve_layer(module, index) for index, module in enumerate(_layers_of(body))]
    owners = [owner for layer in layers for owner in {id(mlp.module) for mlp in layer.mlps} - {id(layer.module)}]
    if len(set(owners)) < len(owners):
        raise UnsupportedModelError(f"{type(body).__name__} has layers that share an MLP")
    return Decoder(model, body, layers)


def _has_layers(body: nn.Module) -> bool:
    """Whether a module calls a list of layers of which some have MLPs or experts."""
    return any(
        _find_mlps(module, index) or find_experts(module, index) for index, module in enumerate(_layers_of(body))
    )


def _layers_of(body: nn.Module) -> Iterable[nn.Module]:
    """The list of layers of a module; empty if it has none."""
    lists = (at_path(body, path) for path in LAYERS)
    return next((layers for layers in lists if isinstance(layers, nn.ModuleList)), ())


def resolve_layer(module: nn.Module, index: int) -> Layer:
    """Find the prunable parts of a layer; raises an error if its MLP cannot be pruned as a whole."""
    if getattr(module, "chunk_size_feed_forward", 0):  # Its matrices would see a part of the tokens at a time.
        raise UnsupportedModelError(
            f"layer {index} ({type(module).__name__}) runs its MLP on chunks of the text",
            hint="set chunk_size_feed_forward to 0 in config.json of the model",
        )
    experts, mlps = find_experts(module, index), _find_mlps(module, index)
    if experts is None and not mlps and any(_MLP_CLASS.search(type(m).__name__) for m in _inside(module)):
        raise MissingStatisticsError(index, f"{type(module).__name__} has no MLP in a known layout")
    if len(mlps) > 1:
        raise UnsupportedModelError(
            f"layer {index} ({type(module).__name__}) has {len(mlps)} MLPs",
            hint="mixtures of experts can be pruned where transformers fuses the experts, as in Mixtral",
        )
    if experts is not None:
        shared = (replace(mlp, where=f"{index} shared expert", prefix="shared_expert.") for mlp in mlps)
        mlps = (*experts.mlps(index), *shared)
    _refuse_leftovers(module, index, mlps)
    return Layer(index, module, mlps, _find_attention(module, index), experts)


def _refuse_leftovers(layer: nn.Module, index: int, mlps: tuple[Mlp, ...]) -> None:
    """Refuse a layer with an MLP matrix that is in none of the blocks: it would stay dense without a word."""
    known = {id(projection.module) for mlp in mlps for projection in mlp.projections.values()}
    owners = {id(mlp.module) for mlp in mlps}
    # What is beside an MLP in the same module is judged by its own name, not by that of the module.
    parents = {name.rpartition(".")[0] + "." for name, module in layer.named_modules() if id(module) in owners}
    for name, module in layer.named_modules():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
        own = next((name.removeprefix(parent) for parent in parents if name.startswith(parent)), name)
        if matrices and id(module) not in known and _MLP_PART.search(name) and not _NO_MLP_PART.search(own):
            raise UnsupportedModelError(
                f"layer {index} ({type(layer).__name__}) has an MLP matrix that cannot be pruned: {name}"
            )


def _inside(layer: nn.Module) -> list[nn.Module]:
    """The modules in a layer, without itself."""
    return [module for module in layer.modules() if module is not layer]


def _find_mlps(layer: nn.Module, index: int) -> tuple[Mlp, ...]:
    named = layer.named_modules()
    found = ((name, layout.find(module, index)) for name, module in named for layout in LAYOUTS.values())
    return tuple(mlp for name, mlp in found if mlp is not None and (mlp.gated or not _ROUTER_OR_NORM.search(name)))


def _find_attention(layer: nn.Module, index: int) -> Attention | None:
    found = []
    for module in layer.modules():
        linears = {role: getattr(module, role, None) for role in ATTENTION_PROJECTIONS}
        linears["o_proj"] = getattr(module, "out_proj", linears["o_proj"])  # OPT, GPT-J
        projections = {role: Projection(linear) for role, linear in linears.items() if isinstance(linear, nn.Linear)}
        if len(projections) == len(ATTENTION_PROJECTIONS):
            found.append(Attention(index, module, projections))
    return found[0] if len(found) == 1 else None  # Of several, one would stay dense without a word.


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
