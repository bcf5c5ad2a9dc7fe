"""A dense model carved into a mixture of experts, without training (MoEfication, arXiv 2110.01786; CMoE, 2502.04416).

    python benchmarks/carve_mixture.py --calibrate valid.txt --evaluate test.txt --save out/carved

The neurons of a layer form parts of equal size: those that fire most often are the shared expert (``--shared`` parts),
the others are clustered by when they fire, with the core's k-means, into balanced experts. The router is the
least-squares fit of the norm of each expert's output, scaled to nearly zero, so that the chosen experts have equal
gates, and ``down_proj`` is multiplied by their number. The folder is an ordinary Qwen2-MoE checkpoint, or Mixtral
without a shared expert. Checked: with all experts on, perplexity is that of the dense model. The layout of LLaMA only:
Gemma has a norm after the block, which these mixtures lack.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from neuronrank_core import Recipe
from neuronrank_core.statistics.topics import spherical_kmeans, topic_draws, unit_rows
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import Layer, find_decoder
from neuronrank_torch.text.sequences import calibration_sequences
from neuronrank_torch.text.sources import load_text

#: A neuron fires at a token where it is among this share of the layer's neurons that add most to the output.
FIRES = 0.25
#: Standard deviation of the router's logits.
LOGITS = 1e-3


def clusters(fires: np.ndarray, experts: int, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """Neurons of the shared expert, and of each expert: (experts, size). ``fires`` has a row per token."""
    often = np.argsort(-fires.mean(0), kind="stable")
    size = len(often) // (experts + shared)
    rest = np.sort(often[shared * size :])
    projection, initial = topic_draws(len(rest), len(fires), experts, seed=0)
    rows = unit_rows(fires[:, rest].T @ projection)
    _, centroids = spherical_kmeans(rows, rows[initial])
    seats = linear_sum_assignment(rows @ np.repeat(centroids, size, axis=0).T, maximize=True)[1]
    members = [rest[seats // size == expert] for expert in range(experts)]
    return np.sort(often[: shared * size]), np.stack(members)


def router(inputs: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Rows that predict from a token's input how strong each expert is beside the others."""
    x = inputs.double()
    target = (strengths / strengths.mean(1, keepdim=True)).double()
    gram = x.T @ x
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ target).T
    return weight * (LOGITS / (x @ weight.T).std())


def new_model(dense: Any, experts: int, shared: int, on: int) -> Any:
    """An untrained mixture with all of the dense model except its MLPs."""
    config = dense.config.to_dict()
    size = config["intermediate_size"] // (experts + shared)
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept += ("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    same = {key: config[key] for key in (*kept, "bos_token_id", "eos_token_id", "pad_token_id")}
    if shared:
        model = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **same,
                num_experts=experts,
                num_experts_per_tok=on,
                norm_topk_prob=True,
                moe_intermediate_size=size,
                shared_expert_intermediate_size=shared * size,
                qkv_bias=False,
            )
        )
    else:
        model = MixtralForCausalLM(
            MixtralConfig(**same, num_local_experts=experts, num_experts_per_tok=on, intermediate_size=size)
        )
    rest = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(rest, strict=False)
    if unexpected or any(".mlp." not in name for name in missing):
        raise click.ClickException(f"not the layout of LLaMA: {dense.config.model_type}")
    return model.eval()


def fill(target: Any, source: Layer, hidden: torch.Tensor, inputs: torch.Tensor, shared: int, on: int) -> None:
    """Write the experts and the router of a layer. ``hidden`` and ``inputs`` are those of its MLP on some text."""
    gate, up, down = (source.mlp.weights[role] for role in ("gate_proj", "up_proj", "down_proj"))
    added = hidden.abs() * down.norm(dim=0)
    fires = added >= added.quantile(1 - FIRES, dim=1, keepdim=True)
    common, members = clusters(fires.numpy().astype(np.float32), target.experts.num_experts, shared)
    for expert, neurons in enumerate(torch.from_numpy(members)):
        target.experts.gate_up_proj[expert] = torch.cat([gate[neurons], up[neurons]])
        target.experts.down_proj[expert] = on * down[:, neurons]
    strengths = torch.stack([(hidden[:, n] @ down[:, n].T).norm(dim=1) for n in torch.from_numpy(members)], dim=1)
    target.gate.weight.copy_(router(inputs, strengths))
    if shared:
        always = torch.from_numpy(common)
        target.shared_expert.gate_proj.weight.copy_(gate[always])
        target.shared_expert.up_proj.weight.copy_(up[always])
        target.shared_expert.down_proj.weight.copy_(2 * down[:, always])  # Its gate is sigmoid(0).
        target.shared_expert_gate.weight.zero_()


def set_on(model: Any, before: int, on: int) -> None:
    """Let ``on`` instead of ``before`` experts run at each token."""
    model.config.num_experts_per_tok = on
    for layer in model.model.layers:
        layer.mlp.gate.top_k = on
        layer.mlp.experts.down_proj *= on / before


@click.command(context_settings={"show_default": True})
@click.option("--model", default="builtin:smollm2-135m")
@click.option("--calibrate", required=True, help="Text that shows which neurons fire together.")
@click.option("--evaluate", "evaluate_on", required=True, help="Text for perplexity.")
@click.option("--experts", default=12)
@click.option("--shared", default=4, help="Size of the shared expert, in experts; 0 for none.")
@click.option("--on", default=6, help="Experts that run at each token.")
@click.option("--nsamples", default=16)
@click.option("--seqlen", default=256)
@click.option("--windows", default=8)
@click.option("--save", type=click.Path(path_type=Path), default=Path("out/carved"))
@torch.no_grad()
def main(
    model: str,
    calibrate: str,
    evaluate_on: str,
    experts: int,
    shared: int,
    on: int,
    nsamples: int,
    seqlen: int,
    windows: int,
    save: Path,
) -> None:
    """Carve the model, check it, and save it."""
    dense, tokenizer, _ = load_model(model)
    held = load_text(evaluate_on, "evaluation")
    carved = new_model(dense, experts, shared, on)
    decoder, seen = find_decoder(dense), {}
    hooks = []
    for layer, target in zip(decoder.layers, carved.model.layers, strict=True):
        gate, down = layer.mlp.projections["gate_proj"], layer.mlp.projections["down_proj"]
        hooks.append(gate.on_input(lambda x, i=layer.index: seen.update({i: x.flatten(0, 1)})))

        def carve(hidden: torch.Tensor, source: Layer = layer, into: Any = target.mlp) -> None:
            fill(into, source, hidden.flatten(0, 1), seen.pop(source.index), shared, on)

        hooks.append(down.on_input(carve))
    recipe = Recipe(nsamples=nsamples, seqlen=seqlen)
    decoder.body(calibration_sequences(tokenizer, recipe, load_text(calibrate, "calibration")))
    for hook in hooks:
        hook.remove()

    def perplexity(measured: Any) -> float:
        return evaluate(measured, tokenizer, held, seqlen=512, windows=windows, batch_size=2).perplexity

    original = perplexity(dense)
    set_on(carved, on, experts)
    whole = perplexity(carved)
    if not math.isclose(whole, original, rel_tol=2e-3):
        raise click.ClickException(f"perplexity {whole:.3f} with all experts on, {original:.3f} of the dense model")
    set_on(carved, experts, on)
    carved.save_pretrained(save)
    tokenizer.save_pretrained(save)
    click.echo(f"dense {original:.3f}; all experts {whole:.3f}; {on} of {experts} {perplexity(carved):.3f}")


if __name__ == "__main__":
    main()
