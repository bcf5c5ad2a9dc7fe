"""Peak memory of pruning a large model: a random-weight LLaMA, written and pruned without ever being held as a whole.

    python benchmarks/low_memory.py --layers 32 --out out/low_memory.json

The default is the shape of LLaMA 7B in bfloat16, 13.5 GB on disk. What is measured is the peak resident memory of one
process: the command ``neuronrank prune`` with everything it imports.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from cells import add_cell
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from neuronrank_torch.model.tensor_files import write_index, write_shard
from neuronrank_torch.pruning.result import versions


def llama_config(layers: int, hidden: int, intermediate: int, vocab: int, heads: int) -> LlamaConfig:
    """Configuration of a bfloat16 LLaMA of this shape."""
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_model(folder: Path, config: LlamaConfig, seed: int = 0) -> None:
    """Write a LLaMA of random bfloat16 weights, one shard in memory at a time."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    units = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        for i in range(config.num_hidden_layers)
    ]
    units.append({"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)})
    units.append({"lm_head.weight": (vocab, hidden)})
    files = [folder / f"model-{i:05d}-of-{len(units):05d}.safetensors" for i in range(1, len(units) + 1)]
    for shapes, file in zip(units, files, strict=True):
        write_shard({name: _random(shape, generator) for name, shape in shapes.items()}, file)
    write_index(files, folder)
    config.save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text is calibration text, and any vocabulary from 256 on is large enough."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A matrix that keeps activations of order one, or a norm of ones."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.fill_(1) if len(shape) == 1 else tensor.normal_(0, shape[-1] ** -0.5, generator=generator)


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


@click.command(context_settings={"show_default": True, "ignore_unknown_options": True})
@click.option("--layers", default=32)
@click.option("--hidden", default=4096)
@click.option("--intermediate", default=11008)
@click.option("--vocab", default=32000)
@click.option("--heads", default=32)
@click.option("--nsamples", default=2)
@click.option("--seqlen", default=128)
@click.option("--work", type=click.Path(path_type=Path), help="Where to put the models; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Add the result to this file of JSON lines.")
@click.argument("flags", nargs=-1)
def main(
    layers: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    heads: int,
    nsamples: int,
    seqlen: int,
    work: Path | None,
    out: Path | None,
    flags: tuple[str, ...],
) -> None:
    """Write the model, prune it with FLAGS added to the command, and print what it took as JSON."""
    config = llama_config(layers, hidden, intermediate, vocab, heads)
    with tempfile.TemporaryDirectory(dir=work) as place:
        model, pruned = Path(place, "model"), Path(place, "pruned")
        write_model(model, config)
        command = [sys.executable, "-m", "neuronrank_cli", "prune", "--model", str(model), "--save", str(pruned)]
        command += ["--nsamples", str(nsamples), "--seqlen", str(seqlen), "--json", *flags]
        started = time.perf_counter()
        report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        seconds = time.perf_counter() - started
        result: dict[str, Any] = {
            "shape": {"layers": layers, "hidden": hidden, "intermediate": intermediate, "vocab": vocab, "heads": heads},
            "flags": list(flags),
            "tokens": nsamples * seqlen,
            # Kilobytes on Linux.
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "seconds": seconds,
            "model_bytes": size(model),
            "pruned_bytes": size(pruned),
            "sparsity": report["total"]["zeros"] / report["total"]["prunable"],
            "versions": versions(),
        }
    click.echo(json.dumps(result, indent=2))
    if out is not None:
        add_cell(out, **result)


if __name__ == "__main__":
    main()
