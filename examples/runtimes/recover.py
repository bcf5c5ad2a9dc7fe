"""Train a smaller model with LoRA and merge the result: ``recover.py FOLDER TARGET [STEPS]``; needs peft."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuronrank_torch import load_text

folder, target, steps = sys.argv[1], sys.argv[2], int([*sys.argv, 100][3])
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(folder)
smaller = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
shapes = {name: parameter.shape for name, parameter in smaller.named_parameters()}


def windows(part: str, length: int = 128) -> torch.Tensor:
    """A part of the text in windows, shape (windows, length)."""
    tokens = tokenizer(load_text("builtin", part)[:1_000_000], return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // length * length].view(-1, length)


train, held_out = windows("calibration"), windows("evaluation")[:16]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module) -> float:
    """Mean loss per token."""
    return float(torch.stack([model(row[None], labels=row[None]).loss for row in held_out]).mean())


model = get_peft_model(smaller, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
print(f"before: loss {held_out_loss(model):.4f}")
adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
for _ in range(steps):
    batch = train[torch.randint(len(train), (4,))]
    loss = model(batch, labels=batch).loss
    loss.backward()
    adam.step()
    adam.zero_grad()
print(f"after {steps} steps: loss {held_out_loss(model):.4f}")
merged = model.merge_and_unload()
assert {name: parameter.shape for name, parameter in merged.named_parameters()} == shapes
print(f"merged: loss {held_out_loss(merged):.4f}, every shape as before")
merged.save_pretrained(target)
tokenizer.save_pretrained(target)
