"""SliceGPT: the hidden states are rotated to their principal components, and the last ones are cut off everywhere.

Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", arXiv 2401.15024, as in
github.com/microsoft/TransformerCompression: the gains of the norms go into the linear layers, every block gets the
principal components of its own signals, computed with the earlier layers already sliced, and a shortcut matrix per
block turns the residual from one basis to the next. The output of the last layer keeps its width. Three choices help
it: the width is any whole number (its code rounds down to a multiple of 8), the embeddings are not centred (its code
centres them for every model, which only LayerNorm leaves without effect), and the norms keep their own epsilon.
The basis is the principal one; another basis of the same space (its default) computes the same. No training follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neuronrank_torch.pruning.passes import outside_embeddings


class Gainless(nn.Module):
    """Root-mean-square norm without a gain; the mean is over the width before slicing."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states over their root mean square."""
        return hidden_states * torch.rsqrt(hidden_states.pow(2).sum(-1, keepdim=True) / self.width + self.eps)


class Sliced(nn.Module):
    """Decoder layer whose two residuals go through shortcut matrices."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm = fused(layer.input_layernorm, attention_inputs(layer))
        self.post_attention_layernorm = fused(layer.post_attention_layernorm, mlp_inputs(layer))
        self.attn_shortcut: Tensor
        self.mlp_shortcut: Tensor

    def before_mlp(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states after the attention."""
        attention = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states @ self.attn_shortcut + attention

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states after the layer."""
        hidden_states = self.before_mlp(hidden_states, **kwargs)
        return hidden_states @ self.mlp_shortcut + self.mlp(self.post_attention_layernorm(hidden_states))


def attention_inputs(layer: Any) -> list[nn.Linear]:
    """Linear layers that read the input of the attention."""
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def mlp_inputs(layer: Any) -> list[nn.Linear]:
    """Linear layers that read the input of the MLP."""
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def fused(norm: Any, readers: Iterable[nn.Linear]) -> Gainless:
    """The norm without its gain, which goes into the linear layers that read it."""
    for linear in readers:
        linear.weight = nn.Parameter((linear.weight.double() * norm.weight.double()).float())
    return Gainless(len(norm.weight), norm.variance_epsilon)


def turn_inputs(linears: Iterable[nn.Linear], basis: Tensor) -> None:
    """Linear layers that read hidden states in another basis, shape (old width, new width)."""
    for linear in linears:
        linear.weight = nn.Parameter((linear.weight.double() @ basis).float())
        linear.in_features = basis.shape[1]


def turn_outputs(linear: nn.Linear, basis: Tensor) -> None:
    """A linear layer that writes hidden states in another basis, shape (old width, new width)."""
    linear.weight = nn.Parameter((basis.T @ linear.weight.double()).float())
    if linear.bias is not None:
        linear.bias = nn.Parameter((basis.T @ linear.bias.double()).float())
    linear.out_features = basis.shape[1]


def principal(signals: Tensor) -> Tensor:
    """Principal components of signals of shape (..., width), not centred: a column each, the largest first."""
    moments = sum(x.T @ x for x in (sequence.double() for sequence in signals))
    moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    return torch.linalg.eigh(moments)[1].flip(1)


def sliced_size(model: Any, width: int) -> int:
    """Number of parameters outside the embeddings after slicing to a width."""
    full, layers = model.config.hidden_size, model.model.layers
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    narrowed = sum(m.weight.numel() for m in linears) // full * width
    # The last layer's output and the shortcut to it keep their width.
    wider = (full - width) * (width + layers[-1].mlp.down_proj.in_features)
    return narrowed + 2 * len(layers) * width**2 + wider


def width_for(model: Any, keep: float) -> int:
    """The largest width that keeps at most a share of the parameters outside the embeddings."""
    most = keep * outside_embeddings(model)
    return max(width for width in range(1, model.config.hidden_size) if sliced_size(model, width) <= most)


def prune(model: Any, sequences: Tensor, keep: float) -> None:
    """Slice the hidden states until a share of the parameters outside the embeddings stays."""
    if hasattr(model.model.layers[0], "post_feedforward_layernorm"):
        raise NotImplementedError(
            "SliceGPT rotates what a block writes, and here a norm with a gain for each channel comes after each block"
        )
    slice_to(model, sequences, width_for(model, keep))


@torch.no_grad()
def slice_to(model: Any, sequences: Tensor, width: int) -> None:
    """Slice the hidden states to a width, and leave those after the last layer as wide as they were."""
    decoder, head = model.model, model.get_output_embeddings()
    arguments: dict[str, Any] = {}
    hook = decoder.layers[0].register_forward_pre_hook(lambda _, __, kw: arguments.update(kw), with_kwargs=True)
    decoder(sequences[:1], use_cache=False)
    hook.remove()
    model.config.tie_word_embeddings = False
    head.weight = nn.Parameter(head.weight.clone())
    decoder.norm = fused(decoder.norm, [head])
    signals = torch.stack([decoder.embed_tokens(sequence) for sequence in sequences])
    basis = principal(signals)[:, :width]
    embedding = decoder.embed_tokens
    embedding.weight, embedding.embedding_dim = nn.Parameter((embedding.weight.double() @ basis).float()), width
    for i, old in enumerate(decoder.layers):
        layer = decoder.layers[i] = Sliced(old)
        turn_inputs(attention_inputs(layer), basis)
        states = signals @ basis.float()
        layer.attn_shortcut = nn.Parameter(basis.T.float())
        between = torch.cat([layer.before_mlp(x[None], **arguments) for x in states])
        middle = principal(between)[:, :width]
        turn_outputs(layer.self_attn.o_proj, middle)
        layer.attn_shortcut = nn.Parameter((basis.T @ middle).float())
        turn_inputs(mlp_inputs(layer), middle)
        layer.mlp_shortcut = nn.Parameter(middle.T.float())
        signals = torch.cat([layer(x[None], **arguments) for x in states])
        basis = principal(signals)
        if i + 1 < len(decoder.layers):
            basis = basis[:, :width]
        turn_outputs(layer.mlp.down_proj, basis)
        layer.mlp_shortcut = nn.Parameter((middle.T @ basis).float())
    turn_inputs([head], basis)
