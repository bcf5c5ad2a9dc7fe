"""Everything a page shows, as plain data; a section whose inputs are not there says what to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from neuronrank_core import LayerStatistics
from neuronrank_torch.kernels import TorchKernels
from neuronrank_torch.model.open import load_model
from neuronrank_torch.model.structure import MLP_PROJECTIONS, prunable_linears
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.runs.page.generation import continuations
from neuronrank_torch.runs.page.neurons import LayerNeurons, distributions, layer_neurons, tf_idf_map
from neuronrank_torch.runs.page.passages import Passages
from neuronrank_torch.runs.page.sources import InsightJob, Sources, UnavailableError
from neuronrank_torch.runs.page.specialists import add_passages, pick
from neuronrank_torch.runs.page.topics import describe_topics
from neuronrank_torch.runs.page.weights import SAVED, agreement, method_masks, rival_recipes, saved_zeros, zero_masks

Section = dict[str, Any]


def gather(job: InsightJob, progress: Progress = silent) -> dict[str, Any]:
    """Collect what a page shows of a pruned model.

    Parameters
    ----------
    job : InsightJob
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Returns
    -------
    dict
        ``run``: what ``neuronrank.json`` says; ``folder``; ``model``: name of the dense model; and the sections
        ``sparsity``, ``statistics``, ``neurons``, ``topics``, ``specialists``, ``agreement``, ``generation``. A section
        that cannot be made holds ``missing`` alone: what to give.

    Raises
    ------
    NeuronRankError
        If something that was given cannot be used.
    """
    page = _Page(Sources(job), progress)
    return {
        "run": page.sources.report,
        "folder": job.folder,
        "model": page.sources.dense_name,
        "sparsity": page.sparsity(),
        **{name: _available(getattr(page, name)) for name in _SECTIONS},
    }


_SECTIONS = ("statistics", "neurons", "topics", "specialists", "agreement", "generation")


def _available(section: Callable[[], Section]) -> Section:
    try:
        return section()
    except UnavailableError as missing:
        return {"missing": str(missing)}


class _Page:
    """The sections of one page."""

    def __init__(self, sources: Sources, progress: Progress) -> None:
        self.sources, self.progress = sources, progress
        self.kernels = TorchKernels(sources.device)

    @property
    def layers(self) -> int:
        return len(self.sources.saved[0].decoder.layers)

    def in_detail(self, among: list[int]) -> list[int]:
        """The layers that are shown one by one: evenly spread, first and last among them."""
        count = min(self.sources.job.layers, len(among))
        return [among[int(i)] for i in np.unique(np.linspace(0, len(among) - 1, count).round())]

    def table(self, layer: int) -> LayerStatistics:
        return self.sources.statistics.table(layer)

    def sparsity(self) -> Section:
        """Zeros by layer and module, as the saved weights have them."""
        model, _, source = self.sources.saved
        counted = saved_zeros(
            model,
            include_attention=self.sources.recipe.include_attention,
            progress=self.progress,
        )
        return {"layers": counted, "bytes": source.weight_bytes()}

    def statistics(self) -> Section:
        """What the statistics are of, and how they are read."""
        header, reading = self.sources.statistics.header, self.sources.reading
        return {
            "header": header,
            "path": str(self.sources.statistics.path),
            "mode": reading.mode,
            "k": reading.tfidf_k,
            "q": reading.q_active,
            "same_text": header["text_sha256"] == self.sources.report["calibration"].get("text_sha256"),
        }

    @cached_property
    def known(self) -> list[LayerNeurons]:
        """Every layer's neurons."""
        return list(self._known())

    def _known(self) -> Iterator[LayerNeurons]:
        for layer in range(self.layers):
            self.progress("reading statistics", layer, self.layers, "layers")
            yield layer_neurons(layer, self.table(layer), self.sources.reading, self.kernels)

    def neurons(self) -> Section:
        """Distributions over all layers, and TF against IDF in some."""
        shown = self.in_detail(list(range(self.layers)))
        return {"distributions": distributions(self.known), "map": tf_idf_map(self.known[layer] for layer in shown)}

    def topics(self) -> Section:
        """Topics of some layers."""
        reading = self.sources.reading
        if reading.mode != "topic":
            raise UnavailableError(f"The run is in {reading.mode} mode: give --nr-tfidf-mode topic to see topics.")
        passages, missing = self._passages()
        described = []
        for layer in self.in_detail(list(range(self.layers))):
            table = self.table(layer)
            words = passages.sampled_tokens(table) if passages else None
            described.append(describe_topics(layer, table, reading, self.kernels, words))
        return {"layers": described, "words_missing": missing}

    def specialists(self) -> Section:
        """Specialists and generalists."""
        picked: Section = dict(pick(self.known))
        passages, missing = self._passages()
        if passages:
            add_passages(picked, self.table, passages)
        return {**picked, "passages_missing": missing}

    def _passages(self) -> tuple[Passages | None, str]:
        """The text behind the statistics, or what to give for it."""
        try:
            return self.sources.passages, ""
        except UnavailableError as missing:
            return None, str(missing)

    def agreement(self) -> Section:
        """Which weights the methods, and the saved model, agree to keep."""
        recipe = self.sources.recipe
        self.sources.statistics  # noqa: B018 (asked for before the dense model)
        if recipe.whole_neurons:
            raise UnavailableError("Whole neurons were removed, so there are no zeros to compare with other methods'.")
        dense, saved, recipes = self.sources.dense[0], self.sources.saved[0], rival_recipes(recipe)
        pruned = {layer["layer"]: layer["modules"] for layer in self.sources.report["layers"]}
        shown = self.in_detail([layer for layer in range(self.layers) if layer in pruned])

        def masks() -> Iterator[dict[str, Any]]:
            for done, layer in enumerate(shown):
                self.progress("comparing methods", done, len(shown), "layers")
                ratio = None if recipe.allocate == "uniform" else _share(pruned[layer])
                with dense.resident(layer):
                    mlp = prunable_linears(dense.decoder.layers[layer], layer)
                    found = method_masks(layer, mlp, self.table(layer), recipes, self.kernels, ratio)
                yield {SAVED: zero_masks(saved, layer), **found}

        return {**agreement(masks()), "layers": shown}

    def generation(self) -> Section:
        """Text before and after."""
        job = self.sources.job
        if not job.new_tokens:
            raise UnavailableError("Give --new-tokens above 0 to see text.")
        self.progress("generating text with the pruned model", 0, 1, "models")
        after = self._continuations(job.folder)
        try:
            self.sources.dense  # noqa: B018 (opened to know that it is there)
            self.progress("generating text with the original model", 0, 1, "models")
            before, missing = self._continuations(self.sources.dense_name), ""
        except UnavailableError as unavailable:
            before, missing = [""] * len(after), str(unavailable)
        rows = zip(job.prompts, before, after, strict=True)
        return {
            "texts": [{"prompt": prompt, "before": b, "after": a} for prompt, b, a in rows],
            "before_missing": missing,
        }

    def _continuations(self, spec: str) -> list[str]:
        job = self.sources.job
        model, tokenizer, _ = load_model(spec, dtype=job.dtype, device=self.sources.device)
        return continuations(model, tokenizer, job.prompts, job.new_tokens)


def _share(modules: dict[str, Any]) -> float:
    """Share of a layer's MLP weights that the run made zero."""
    mlp = [module for name, module in modules.items() if name in MLP_PROJECTIONS]
    zeros, size = (sum(int(module[key]) for module in mlp) for key in ("zeros", "size"))
    return zeros / size
