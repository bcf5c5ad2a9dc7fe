"""The model card of a pruned model: ``README.md`` of its folder."""

from dataclasses import fields
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from neuronrank_core import Recipe
from neuronrank_core.errors import first_line
from neuronrank_core.methods import without_effect
from neuronrank_core.recipe import Exponents
from neuronrank_torch.model.source import ModelSource
from neuronrank_torch.runs.prune_result import PruneResult

CARD = "README.md"
#: Where the text of the source's own card is kept.
BASE_CARD = "README-base-model.md"
#: Metadata of the source's card that holds for the pruned model too.
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "base_model", "tags")
_CITATION = """@software{neuronrank,
  title = {NeuronRank},
  author = {The NeuronRank authors},
  version = {VERSION}
}"""


def model_cards(result: PruneResult, source: ModelSource, command: str) -> tuple[dict[str, str], list[str]]:
    """The card of a pruned model, and the card of its source if there is one: contents by file name, and notes."""
    texts, notes, data = {}, [], {}
    file = source.path / CARD
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        texts[BASE_CARD] = text
        notes.append(f"{CARD} of the source is kept as {BASE_CARD}; the new {CARD} describes the pruned model")
        try:
            found: dict[str, Any] = vars(ModelCard(text, ignore_metadata_errors=True).data)
            data = {name: found[name] for name in _KEPT if found.get(name)}
        except Exception as error:  # What the parser of YAML raises has no common base class with the card's errors.
            notes.append(f"the metadata in {CARD} of the source cannot be read: {first_line(error)}")
    if source.license:
        data.setdefault("license", source.license)
    if source.kind == "hub":
        data["base_model"] = source.spec
    data["tags"] = [*data.get("tags", ()), "pruned", "neuronrank"]  # The card's class makes them unique.
    metadata = ModelCardData(library_name="transformers", **data)
    texts[CARD] = f"---\n{metadata.to_yaml()}\n---\n\n{_body(result, source, command, data.get('license'))}"
    return texts, notes


def _body(result: PruneResult, source: ModelSource, command: str, licence: Any) -> str:
    name = source.spec if source.kind == "hub" or source.spec.startswith("builtin:") else source.path.name
    total, dense = result.total, result.source.parameters if result.source else result.total.parameters
    plain, idle = Recipe(), set(without_effect(result.recipe, [f.name for f in fields(Exponents)]))
    idle |= {"method"} if result.recipe.removes_layers else set()
    settings = {f.name: getattr(result.recipe, f.name) for f in fields(Recipe) if f.name not in idle}
    recipe = "\n".join(
        f"| `{field}` | {value} |"
        for field, value in settings.items()
        if value != getattr(plain, field) or field in ("method", "sparsity_type", "sparsity_ratio")
    )
    if result.choice and result.choice.passes:
        recipe += f"\n| removed | {result.choice.chosen} |"
    modules: dict[str, list[int]] = {}
    for layer in result.layers:
        for role, module in layer.modules.items():
            sums = modules.setdefault(role.rpartition(".")[2], [0, 0, 0])
            sums[:] = (a + b for a, b in zip(sums, (module.size, module.zeros, module.removed), strict=True))
    rows = "\n".join(
        f"| `{role}` | {a:,} | {b:,} | {c:,} | {(c or b) / a:.2%} |" for role, (a, b, c) in sorted(modules.items())
    )
    if result.removed_layers:
        removed = ", ".join(map(str, result.removed_layers))
        rows += f"\n\nLayers removed, as the base model numbers them: {removed}."
    lost = f"{dense - total.parameters:,} removed" if total.removed else f"{total.zeros:,} zero"
    share = (dense - total.parameters if total.removed else total.zeros) / dense
    return f"""# {name}, pruned

{name} with {share:.2%} of its {dense:,} parameters pruned ({lost}) by NeuronRank
{result.versions.get("neuronrank", "")}.
Licence: {licence or "not named by the source; that of the base model applies"}.

## Recipe

| setting | value |
| --- | --- |
{recipe}

```bash
{command or "# called from Python"}
```

## Sparsity

| module | weights | zero | removed | share |
| --- | --- | --- | --- | --- |
{rows}

## Quality

{_quality(result)}

## Limits

- Faster: {result.faster}.
- Perplexity does not say how well the model does other tasks; what was pruned may matter for texts unlike the
  calibration text.
- It has the biases and limits of the base model.

## Citation

```bibtex
{_CITATION.replace("VERSION", result.versions.get("neuronrank", ""))}
```
"""


def _quality(result: PruneResult) -> str:
    change = result.perplexity
    if change is None or result.job.evaluation is None:
        return "Not measured."
    after, moved = change.after, change.divergence
    lines = [
        f"| measure, on {result.job.evaluation.dataset}, {after.windows} windows of {after.seqlen} tokens | value |",
        "| --- | --- |",
        f"| perplexity before | {change.before.perplexity:.4f} |",
        f"| perplexity after | {after.perplexity:.4f} |",
    ]
    if moved is not None:
        error = moved.perplexity_change_error
        lines += [
            f"| change | {moved.perplexity_change:+.2%}{f' ± {error:.2%}' if error is not None else ''} |",
            f"| KL divergence from the base model, nats per token | {moved.kl_mean:.4g} |",
            f"| same most likely token | {moved.agreement:.2%} |",
        ]
    return "\n".join(lines)
