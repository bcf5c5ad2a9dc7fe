"""Merges statistics folders of disjoint documents: what ``neuronrank merge`` does."""

from collections.abc import Sequence
from itertools import pairwise

from neuronrank_core import InputError, merge
from neuronrank_torch.calibration.statistics_folder import StatisticsFolder
from neuronrank_torch.files.durable import STATISTICS, check_output
from neuronrank_torch.files.journal import differences
from neuronrank_torch.progress import Progress, silent
from neuronrank_torch.runs.collect import CollectResult
from neuronrank_torch.saving.statistics_writer import StatisticsWriter
from neuronrank_torch.schema import from_json
from neuronrank_torch.text.sources import SELF, read_documents

#: What may differ: the documents, and names, because fingerprints identify the model and the text.
_FREE = {"model", "dataset", "documents"}


def run_merge(
    folders: Sequence[str],
    save: str,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> CollectResult:
    """Merge tables. The result is bit for bit that of one collection of all their documents.

    Parameters
    ----------
    folders : sequence of str
        In any order.
    save : str
        Output folder.
    force : bool
        Replace existing statistics.
    progress : callable
        See :data:`neuronrank_torch.progress.Progress`.

    Returns
    -------
    CollectResult

    Raises
    ------
    InputError
        If the folders share documents, or are of different models, texts or samplings; says what differs.
    NeuronRankError
        If writing fails.
    """
    target = check_output(save, force, STATISTICS)
    parts = [StatisticsFolder(folder) for folder in folders]
    first = parts[0]
    for part in parts:
        if part.path.resolve().is_relative_to(target):
            raise InputError(f"{target} is one of the folders to merge", hint="choose another output folder")
        changes = differences(*({k: v for k, v in f.header.items() if k not in _FREE} for f in (first, part)))
        if changes:
            raise InputError(
                f"{first.path} and {part.path} cannot be merged: {'; '.join(changes[:3])}",
                hint="merge statistics of one model, text and sampling",
            )
    documents = sorted(document for part in parts for document in part.header["documents"])
    shared = [one for one, next_ in pairwise(documents) if one == next_]
    if shared:
        raise InputError(
            f"the folders share documents, such as {shared[0]}", hint="merge statistics of disjoint --documents"
        )
    header = {**first.header, "documents": documents}
    sources = [str(part.path.resolve()) for part in parts]
    with StatisticsWriter(target, {**header, "folders": sources}, first.layers, force=force) as writer:
        if header["dataset"] == SELF:
            writer.own_text(lambda: read_documents(first.dataset, "calibration").texts)
        left = [unit for unit in first.units if not writer.done(unit)]
        for done, unit in enumerate(left, start=len(first.units) - len(left)):
            progress("merging statistics", done, len(first.units), "tables")
            writer.keep(unit, merge(part.table(unit) for part in parts))
        progress(f"saving {save}", 0, 1, "folders")
        writer.finish(header)
    return from_json(CollectResult, {**header, "save": save}, save, "collect again")
