"""Perplexity on prose and on chats after calibration on prose, on chats, and on text that the model writes itself.

The chats are made here: the model answers short tasks about paragraphs of the prose. Paragraphs of the first 70 % are
for calibration, those of the last 30 % for evaluation.

    python benchmarks/text_kinds.py PROSE.txt FOLDER
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from neuronrank_core import Recipe
from neuronrank_torch import load_model, prune
from neuronrank_torch.evaluation.perplexity import evaluate
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.own_text import write_text
from neuronrank_torch.text.sources import load_text

MODEL, SEQLEN, WINDOWS, CHATS, TOGETHER, ANSWER = "builtin:smollm2-135m", 512, 16, 48, 16, 120
SEEDS, UPDATES = 1, ("none", "gradual")
TASKS = ("Summarise in one sentence: {}", "What is this text about? {}", "Explain to a child: {}", "Continue: {}")


def chats(model, tokenizer, prose: str, file: Path) -> None:
    """Write conversations about paragraphs of a text that are spread over it."""
    paragraphs = [line.strip() for line in prose.split("\n") if len(line) > 300]
    chosen = paragraphs[:: len(paragraphs) // CHATS][:CHATS]
    users = [TASKS[i % len(TASKS)].format(text[:300].rsplit(" ", 1)[0]) for i, text in enumerate(chosen)]
    tokenizer.padding_side, answers = "left", []
    for start in range(0, CHATS, TOGETHER):
        asked = [[{"role": "user", "content": user}] for user in users[start : start + TOGETHER]]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            torch.manual_seed(start)
            output = model.generate(**tokens, max_new_tokens=ANSWER, do_sample=True, temperature=0.7, top_k=0)
        answers += tokenizer.batch_decode(output[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    lines = [
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer.strip()}]}
        for user, answer in zip(users, answers, strict=True)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main(source: str, folder: str) -> None:
    """Make the texts that are not there yet, then prune and measure."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    text = Path(source).read_text(encoding="utf-8")
    cut = text.rfind("\n", 0, int(0.7 * len(text)))
    model, tokenizer, _ = load_model(MODEL)
    for part, prose in {"calibration": text[:cut], "evaluation": text[cut:]}.items():
        (place / f"{part}-prose.txt").write_text(prose, encoding="utf-8")
        if not (place / f"{part}-chat.jsonl").exists():
            chats(model, tokenizer, prose, place / f"{part}-chat.jsonl")
    names = {"prose": "prose.txt", "chat": "chat.jsonl"}
    files = {kind: str(place / f"evaluation-{name}") for kind, name in names.items()}
    held_out = {kind: load_text(file, "evaluation", tokenizer) for kind, file in files.items()}

    def measured(pruned) -> dict[str, float]:
        return {
            kind: round(evaluate(pruned, tokenizer, one, seqlen=SEQLEN, windows=WINDOWS).perplexity, 3)
            for kind, one in held_out.items()
        }

    print("dense", measured(model), flush=True)
    for seed in range(SEEDS):
        recipe = Recipe(nsamples=16, seqlen=SEQLEN, sparsity_ratio=0.5, seed=seed)
        own = place / f"self-{seed}.txt"
        if not own.exists():
            model, tokenizer, _ = load_model(MODEL)
            written = "\n\n".join(write_text(Job(MODEL), recipe, lambda *step: None, model, tokenizer))
            own.write_text(written, encoding="utf-8")
        calibration = {kind: str(place / f"calibration-{name}") for kind, name in names.items()} | {"self": str(own)}
        for update, (kind, file) in itertools.product(UPDATES, calibration.items()):
            model, tokenizer, _ = load_model(MODEL)
            texts = load_text(file, "calibration", tokenizer)
            prune(model, tokenizer, replace(recipe, update=update), texts)
            print(kind, "update", update, "seed", seed, measured(model), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
