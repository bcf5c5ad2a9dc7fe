"""A small mixture of experts, trained from scratch on prose, code and documentation.

    python benchmarks/grow_mixture.py --prose valid.txt --prose test.txt --save out/grown

Qwen3-MoE layout, 16 experts, 2 a token. The texts need no download except the prose: code is the source of the running
Python's standard library, documentation is pydoc's topics and the man pages of this machine. Each kind is cut in a
part to train and calibrate on and a part to measure on: ``texts/{prose,code,docs}-{train,held}.txt`` in the folder of
the model. At the end it prints, for every layer and expert, the share of its tokens that each kind has.
"""

from __future__ import annotations

import gzip
import random
import re
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import click
import torch
from mixture import code_and_docs
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

#: Share of a text that is trained on; the rest is held out.
TRAINED = 0.85
END = "<|endoftext|>"


def man_pages(folder: Path) -> list[str]:
    """Text of the man pages about calls, formats and concepts, without the commands of troff."""
    pages = []
    for path in sorted(page for section in (2, 3, 5, 7) for page in folder.glob(f"man{section}/*.gz")):
        source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        lines = [
            re.sub(r"^[.'][A-Za-z]*\s*", "", line) for line in source.split("\n") if not re.match(r"[.'\\]+\"", line)
        ]
        text = re.sub(r"\\f\[?[A-Z]+\]?|\\[&/,|]", "", "\n".join(lines)).replace("\\-", "-")
        if len(text) > 1000:  # Shorter ones refer to another page.
            pages.append(text)
    return pages


def read_texts(prose: tuple[Path, ...], characters: int) -> dict[str, str]:
    """The text of each kind, at most so long."""
    docs = [*topics.values(), *man_pages(Path("/usr/share/man"))]
    random.Random(0).shuffle(docs)
    texts = {
        "prose": "\n".join(path.read_text(encoding="utf-8") for path in prose),
        "code": code_and_docs(Path(sysconfig.get_path("stdlib")), characters)[0],
        "docs": "\n\n".join(docs),
    }
    return {kind: text[:characters] for kind, text in texts.items()}


def write_texts(texts: dict[str, str], folder: Path) -> dict[str, str]:
    """Write both parts of each text, and return those to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {}
    for kind, text in texts.items():
        cut = int(TRAINED * len(text))
        trained[kind] = text[:cut]
        (folder / f"{kind}-train.txt").write_text(text[:cut], encoding="utf-8")
        (folder / f"{kind}-held.txt").write_text(text[cut:], encoding="utf-8")
    return trained


def new_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)


def balance(router_logits: tuple[torch.Tensor, ...], experts: int) -> torch.Tensor:
    """Mean over layers of the usual load-balancing loss; over all layers at once, one layer may use few experts."""
    losses = [load_balancing_loss_func((logits,), experts, 2) for logits in router_logits]
    return torch.stack(losses).mean()


@torch.no_grad()
def held_out(model: Qwen3MoeForCausalLM, streams: dict[str, torch.Tensor], seqlen: int) -> tuple[dict, torch.Tensor]:
    """Perplexity of each kind, and how many tokens go to each expert: (kinds, layers, experts)."""
    perplexity, counts = {}, []
    experts = model.config.num_experts
    for kind, stream in streams.items():
        windows = stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)[:64]
        loss, routed = [], torch.zeros(model.config.num_hidden_layers, experts)
        for batch in windows.split(16):
            out = model(batch, labels=batch, output_router_logits=True)
            loss.append(out.loss - model.config.router_aux_loss_coef * out.aux_loss)
            for row, logits in zip(routed, out.router_logits, strict=True):
                row += torch.bincount(logits.topk(2).indices.flatten(), minlength=experts)
        perplexity[kind] = round(torch.stack(loss).mean().exp().item(), 2)
        counts.append(routed)
    return perplexity, torch.stack(counts)


@click.command(context_settings={"show_default": True})
@click.option("--prose", required=True, multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--save", type=click.Path(path_type=Path), default=Path("out/grown"))
@click.option("--characters", default=2_400_000, help="At most so many of each kind.")
@click.option("--hidden", default=192)
@click.option("--layers", default=4)
@click.option("--experts", default=16)
@click.option("--width", default=192, help="Neurons of an expert.")
@click.option("--vocabulary", default=4096)
@click.option("--steps", default=1400)
@click.option("--stop", type=int, help="Stop after so many of the steps; the learning rate is that of --steps.")
@click.option("--batch", default=12, help="Sequences a step, a third of each kind.")
@click.option("--seqlen", default=256)
@click.option("--rate", default=3e-3)
@click.option(
    "--norm-topk-prob/--no-norm-topk-prob", "normalised", default=True, help="Whether gates of a token sum to 1."
)
@click.option("--coefficient", default=0.001, help="Of the load-balancing loss: small, so that experts specialise.")
def main(
    prose: tuple[Path, ...],
    save: Path,
    characters: int,
    hidden: int,
    layers: int,
    experts: int,
    width: int,
    vocabulary: int,
    steps: int,
    stop: int | None,
    batch: int,
    seqlen: int,
    rate: float,
    normalised: bool,
    coefficient: float,
) -> None:
    """Train the model, and save it every 100 steps."""
    torch.manual_seed(0)
    texts = write_texts(read_texts(prose, characters), save / "texts")
    tokenizer = new_tokenizer(list(texts.values()), vocabulary)
    tokenizer.save_pretrained(save)

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, verbose=False)["input_ids"])

    streams = {kind: tokens(text) for kind, text in texts.items()}
    held = {kind: tokens((save / "texts" / f"{kind}-held.txt").read_text(encoding="utf-8")) for kind in texts}
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=normalised,
        moe_intermediate_size=width,
        router_aux_loss_coef=coefficient,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    idle = layers * (experts - 2) * 3 * hidden * width
    sizes = {kind: len(stream) for kind, stream in streams.items()}
    click.echo(f"{count:,} parameters, {count - idle:,} active; tokens {sizes}")
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    began = time.perf_counter()
    last = min(steps, stop or steps)
    for step in range(1, last + 1):
        rows = []
        for stream in streams.values():
            offsets = torch.randint(len(stream) - seqlen, (batch // 3,))
            rows.append(stream[offsets[:, None] + torch.arange(seqlen)])
        ids = torch.cat(rows)
        out = model.model(ids, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + coefficient * balance(out.router_logits, experts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step == 1:
            click.echo(f"{step} {time.perf_counter() - began:.0f} s: loss {loss:.3f}")
        if step % 100 == 0 or step == last:
            model.save_pretrained(save)
            click.echo(f"{step}: held-out perplexity {held_out(model, held, seqlen)[0]}")
    counts = held_out(model, held, seqlen)[1]
    for layer, shares in enumerate((counts / counts.sum(0)).transpose(0, 1)):
        click.echo(f"layer {layer}: tokens of {', '.join(texts)} in each expert, %")
        for kind in shares:
            click.echo("  " + " ".join(f"{100 * share:3.0f}" for share in kind))


if __name__ == "__main__":
    main()
