"""What long runs report: stages in words, steps that add up, and a resumed run that starts where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model
from tiny_files import write_model

from neuronrank_core import Recipe
from neuronrank_torch.runs.collect import run_collect
from neuronrank_torch.runs.job import Job
from neuronrank_torch.runs.merge import run_merge

LAYERS, BATCHES = 3, 4
Step = tuple[str, int, int, str]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_model(tmp_path / "model", tiny_model(layers=LAYERS, hidden=32, intermediate=64), bos=False)
    (tmp_path / "text.txt").write_text("One sentence after the other. " * 40)
    return Job(str(tmp_path / "model"), str(tmp_path / "text.txt"), save=str(tmp_path / "stats"), batch_size=1)


RECIPE = Recipe(nsamples=BATCHES, seqlen=32)
TOTAL = LAYERS * BATCHES


def collecting(layer: int, steps: range) -> list[Step]:
    return [(f"collecting layer {layer} of {LAYERS}", done, TOTAL, "micro-batches") for done in steps]


def test_a_collection_counts_micro_batches(job: Job) -> None:
    heard: list[Step] = []
    run_collect(job, RECIPE, progress=lambda *step: heard.append(step))
    assert heard == [
        (f"loading {job.model}", 0, 1, "models"),
        *collecting(1, range(1, 5)),
        *collecting(2, range(5, 9)),
        *collecting(3, range(9, 13)),
        (f"saving {job.save}", 0, 1, "folders"),
    ]


def test_a_resumed_collection_starts_where_it_stands(job: Job) -> None:
    def stop(stage: str, *_: object) -> None:
        if stage.startswith("collecting layer 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_collect(job, RECIPE, progress=stop)
    heard: list[Step] = []
    run_collect(job, RECIPE, progress=lambda *step: heard.append(step))
    assert heard[1:-1] == [
        ("resuming: 2 of 3 layers are finished", 2, 3, "layers"),
        *[("resuming: running finished layer 1 of 3", 8, TOTAL, "micro-batches")] * BATCHES,
        *[("resuming: running finished layer 2 of 3", 8, TOTAL, "micro-batches")] * BATCHES,
        *collecting(3, range(9, 13)),
    ]


def test_a_merge_counts_tables(job: Job, tmp_path: Path) -> None:
    run_collect(job, RECIPE)
    heard: list[Step] = []
    merged = str(tmp_path / "merged")
    run_merge([str(job.save)], merged, progress=lambda *step: heard.append(step))
    assert heard[:-1] == [("merging statistics", done, LAYERS, "tables") for done in range(LAYERS)]
    assert heard[-1] == (f"saving {merged}", 0, 1, "folders")
