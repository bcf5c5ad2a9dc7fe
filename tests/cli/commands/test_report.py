"""The page: complete, safe whatever the text says, honest about what is missing, and shown by a real browser."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from experts import FAMILIES
from pruning import random_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_files import write_model

from neuronrank_cli.app import cli
from neuronrank_torch.files.json import read_sealed, seal
from neuronrank_torch.runs.page import gather

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
BUDGET = ["--nsamples", 6, "--seqlen", 64]
SECTIONS = ["verdict", "text", "perplexity", "sparsity", "neurons", "map", "topics", "specialists", "agreement", "how"]
#: Those that remain without statistics.
BARE = ["verdict", "text", "perplexity", "sparsity", "neurons", "how"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Elements with their attributes, and the text, of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def neuronrank(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a dense model, two pruned ones, and statistics with the text behind them; names hold markup."""
    folder = tmp_path_factory.mktemp("report")
    model, text = folder / "<b>tiny", folder / "<i>text.txt"
    dense = tiny_model(layers=3, hidden=32, intermediate=64)
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[:, :3] = 0  # Zeros of neurons that stay are not removed weights.
    write_model(model, dense, bos=False)
    text.write_text(" ".join(f"{HOSTILE} {i}" for i in range(40)), encoding="utf-8")
    common = ["--model", model, "--dataset", text, *BUDGET]
    neuronrank("collect", *common, "--save", folder / "stats")
    measured = ["--eval", "--eval-dataset", text, "--eval-windows", 2]
    recipe = ["--prune_method", "wanda", "--propagate", "dense", "--sparsity_ratio", 0.4]
    neuronrank("prune", *common, *recipe, *measured, "--save", folder / "pruned")
    neuronrank("prune", *common, "--sparsity_type", "neurons", "--sparsity_ratio", 0.25, "--save", folder / "smaller")
    with torch.no_grad():  # So that it is not the last layer that goes.
        dense.model.layers[1].self_attn.o_proj.weight.zero_()
        dense.model.layers[1].mlp.down_proj.weight.zero_()
    write_model(folder / "cheap", dense, bos=False)
    neuronrank(
        "prune", "--model", folder / "cheap", *common[2:], "--sparsity_type", "layers", "--save", folder / "shallower"
    )
    here = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(here)


@pytest.fixture(scope="module")
def made(place: Path) -> tuple[Path, dict[str, Any]]:
    """A page with everything in it, and its data."""
    file = place / "report.html"
    arguments = ["--stats", "stats", "--prompt", f"{HOSTILE} go", "--new-tokens", 4, "--layers", 2, "--nr-tfidf-k", 8]
    result = neuronrank("report", "pruned", *arguments, "--save", file, "--json")
    return file, json.loads(result.stdout)


def test_every_section_is_there_and_full(made: tuple[Path, dict[str, Any]]) -> None:
    page = Page(made[0])
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == SECTIONS
    assert "Not shown" not in page.text
    labels = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert all(a["aria-labelledby"] in labels for tag, a in page.elements if tag == "section")
    anchors = [a["href"] for tag, a in page.elements if tag == "a"]
    assert anchors == [f"#{name}" for name in SECTIONS]
    assert made[0].stat().st_size < 2 << 20


def test_markup_in_texts_and_names_stays_text(made: tuple[Path, dict[str, Any]]) -> None:
    page = Page(made[0])
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b", "i", "iframe", "object"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert f"{HOSTILE} go" in page.text
    assert "<b>tiny" in page.text
    assert "<i>text.txt" in page.text
    assert "script>alert" in "".join(p["before"] + p["token"] + p["after"] for p in passages(made[1]))


def passages(data: dict[str, Any]) -> list[dict[str, Any]]:
    named = data["specialists"]["specialists"] + data["specialists"]["generalists"]
    return [passage for neuron in named for passage in neuron["passages"]]


def test_it_loads_nothing(made: tuple[Path, dict[str, Any]]) -> None:
    page = Page(made[0])
    links = [value for _, a in page.elements for name, value in a.items() if name in ("src", "href", "xlink:href")]
    assert all(link == "data:," or link.startswith("#") for link in links if link)
    assert "url(" not in page.source
    assert "@import" not in page.source
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_what_it_says_is_what_is_there(made: tuple[Path, dict[str, Any]], place: Path) -> None:
    page, data = Page(made[0]), made[1]
    saved = load_file(place / "pruned" / "model.safetensors")
    for layer in data["sparsity"]["layers"]:
        for name, module in layer["modules"].items():
            weight = saved[f"model.layers.{layer['layer']}.mlp.{name}.weight"]
            zeros = int((weight == 0).sum())
            assert module == {"size": weight.numel(), "zeros": zeros}
            assert f"{zeros / weight.numel():.4%}{zeros:,}" in page.text
    assert data["run"] == json.loads((place / "pruned" / "neuronrank.json").read_text("utf-8"))
    text = (place / "<i>text.txt").read_text("utf-8")
    shown = passages(data)
    assert len(shown) > 10
    assert all(p["before"] + p["token"] + p["after"] in text for p in shown if p["token"] not in "␣⏎")
    assert f"{data['run']['perplexity']['after']['perplexity']:.4f}" in page.text
    assert "2 windows of 64 tokens" in page.text
    assert data["generation"]["texts"][0]["prompt"] == f"{HOSTILE} go"


def test_a_saved_model_keeps_the_weights_of_its_method(made: tuple[Path, dict[str, Any]]) -> None:
    agreement = made[1]["agreement"]
    kept = dict(zip(agreement["methods"], agreement["kept"][0], strict=True))
    assert kept["this model"] == kept["wanda"] == 1.0
    assert all(agreement["chance"] < share < 1 for name, share in kept.items() if name not in ("this model", "wanda"))
    assert agreement["kept"] == [list(column) for column in zip(*agreement["kept"], strict=True)]
    # Two masks that keep 0.6 of the weights each: 0.36 in both, 0.84 in either.
    assert agreement["chance"] == pytest.approx(0.36 / 0.84, abs=0.01)


def test_without_statistics_the_page_says_what_to_give(place: Path) -> None:
    neuronrank("report", "pruned", "--save", "bare.html", "--new-tokens", 0)
    page = Page(place / "bare.html")
    assert [a["id"] for tag, a in page.elements if tag == "section"] == BARE
    assert [a["href"] for tag, a in page.elements if tag == "a"] == [f"#{name}" for name in BARE]
    assert page.text.count("Not shown. Provide --stats") == 1
    assert "Not shown. Set --new-tokens above 0" in page.text
    [shown] = re.findall(r"<pre><code>(.*?)</code></pre>", page.source, re.DOTALL)
    commands = [shlex.split(line) for line in html.unescape(shown).splitlines()]
    collected, made = (str(place / name) for name in ("said", "said.html"))
    commands = [[word.replace("stats", collected) if word == "stats" else word for word in line] for line in commands]
    for (_, *words), more in zip(commands, ([], ["--save", made, "--new-tokens", "0"]), strict=True):
        neuronrank(*words, *more)
    assert "Not shown. Provide --stats" not in Page(place / "said.html").text


def test_experts_and_their_topics(tmp_path: Path) -> None:
    dense = random_model(copy.deepcopy(FAMILIES["qwen3_moe"][0]))  # Its second layer has no experts.
    write_model(tmp_path / "model", dense, bos=False)
    (tmp_path / "text.txt").write_text(" ".join(f"{HOSTILE} {i}" for i in range(40)), encoding="utf-8")
    common = ["--model", tmp_path / "model", "--dataset", tmp_path / "text.txt", *BUDGET]
    neuronrank("collect", *common, "--save", tmp_path / "stats")
    recipe = ["--sparsity_type", "experts", "--sparsity_ratio", 0.4, "--prune_method", "reap"]
    neuronrank("prune", *common, *recipe, "--save", tmp_path / "fewer")
    how = ["--stats", tmp_path / "stats", "--nr-tfidf-k", 8, "--new-tokens", 0]
    saved = neuronrank("report", tmp_path / "fewer", *how, "--save", tmp_path / "page.html", "--json")
    data, page = json.loads(saved.stdout), Page(tmp_path / "page.html")
    sections = ["experts" if name == "neurons" else name for name in BARE]
    assert [a["id"] for tag, a in page.elements if tag == "section"] == sections
    assert [a["href"] for tag, a in page.elements if tag == "a"] == [f"#{name}" for name in sections]
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    layers = data["experts"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 2]
    for layer, was in zip(layers, data["run"]["layers"], strict=True):
        assert sorted(e["expert"] for e in layer["experts"]) == [*range(6)]
        assert [e["expert"] for e in sorted(layer["experts"], key=lambda e: e["expert"]) if e["removed"]] == was[
            "experts_removed"
        ]
        assert sum(e["share"] for e in layer["experts"]) == pytest.approx(2)  # Two a token.
        assert all(e["passages"] for e in layer["experts"] if e["share"] > 0.1)
    assert page.text.count(", removed") == 4
    assert data["topics"]["missing"] == data["specialists"]["missing"] == "The statistics are those of experts."


def test_the_verdict_comes_first(made: tuple[Path, dict[str, Any]], place: Path) -> None:
    page, moved = Page(made[0]), made[1]["run"]["perplexity"]["divergence"]
    saved = load_file(place / "pruned" / "model.safetensors")
    weights = [tensor for name, tensor in saved.items() if ".mlp." in name]
    zeros, whole = (
        sum(values) for values in ([int((w == 0).sum()) for w in weights], map(torch.numel, saved.values()))
    )
    verdict = page.text.partition("Verdict Weights")[2].partition("Text before and after")[0]
    for said in (
        f"set to zero{zeros / whole:.2%}of the {whole:,} parameters of the whole model",
        f"{zeros:,} of {sum(w.numel() for w in weights):,} weights",
        "safetensors float32 → safetensors float32; zeros take as much space as other weights",
        f"Perplexity{moved['perplexity_change']:+.2%}",
        f"standard error of the change {moved['perplexity_change_error']:.2%}",
        f"KL divergence {moved['kl_mean']:.4g} nats per token",
        "Fasternozeros are computed and stored like other weights",
    ):
        assert said in verdict


def test_bars_only_where_layers_differ(place: Path) -> None:
    """Zeros of one module in one layer more than in the others: that module alone is drawn."""
    shutil.copytree("pruned", "uneven")
    file = place / "uneven" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][:, 10:14] = 0
    save_file(weights, file, metadata={"format": "pt"})
    neuronrank("report", "uneven", "--new-tokens", 0, "--save", "uneven.html")
    page = Page(place / "uneven.html")
    assert len([a for tag, a in page.elements if tag == "rect" and a.get("class") == "bar"]) == 3
    assert "Sparsity of up_proj by layer" in page.source
    assert re.search(r"gate_proj: [\d.]+% in each of 3 layers", page.text)
    assert "share of weights" in page.text


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (["--prune_method", "neuronrank_tfidf"], ""),
        (["--prune_method", "neuronrank_tfidf", "--idf-exp", 0], "The run did not use IDF: --idf-exp was 0."),
        (["--prune_method", "wanda"], "The run did not use IDF: wanda does not read it."),
    ],
    ids=str,
)
def test_whether_idf_was_used(tmp_path: Path, recipe: list[object], says: str) -> None:
    name, common = str(tmp_path / "out"), ["--model", "<b>tiny", "--dataset", "<i>text.txt", *BUDGET]
    neuronrank("prune", *common, *recipe, "--save", name)
    flags = ["--stats", "stats", "--nr-tfidf-mode", "topic", "--nr-tfidf-k", 4, "--new-tokens", 0]
    neuronrank("report", name, *flags, "--save", f"{name}.html")
    page = Page(Path(f"{name}.html"))
    assert page.text.count("The run did not use IDF") == (4 if says else 0)
    assert says in page.text


def test_charts_share_size_axes_and_colours(made: tuple[Path, dict[str, Any]]) -> None:
    page, data = Page(made[0]), made[1]
    drawn = [a["viewbox"] for tag, a in page.elements if tag == "svg"]
    assert len(drawn) >= 6
    assert len(set(drawn)) == 1
    assert "two" not in {a.get("class", "").rpartition(" ")[2] for _, a in page.elements if a.get("class")}
    for name in ("mean gate signal", "IDF (nats)", "groups", "ratio"):
        assert name in page.text
    most = max(count for layer in data["neurons"]["map"]["layers"] for *_, count in layer["cells"])
    legend = page.text.partition("neurons per cell:")[2].split()
    assert legend[0] == "1"
    assert str(most) in legend
    full = [a for tag, a in page.elements if tag == "rect" and a.get("class") == "cell" and a["opacity"] == "1.0"]
    assert len(full) == sum(count == most for layer in data["neurons"]["map"]["layers"] for *_, count in layer["cells"])


def test_predictions_are_those_that_eval_measures(made: tuple[Path, dict[str, Any]], place: Path) -> None:
    page, predictions = Page(made[0]), made[1]["predictions"]
    how = ["--reference", "<b>tiny", "--dataset", place / "<i>text.txt", "--seqlen", 64, "--windows", 2, "--json"]
    beside = json.loads(neuronrank("eval", "--model", "pruned", *how).stdout)["reference"]
    for name in ("kl_mean", "kl_p99", "agreement"):
        assert predictions[name] == pytest.approx(beside[name], rel=1e-5)
    shown = f"{predictions['kl_mean']:.4g} {predictions['kl_p99']:.4g} {predictions['agreement']:.2%}"
    assert shown.replace(" ", "") in page.text.replace(" ", "")
    assert f"{made[1]['run']['perplexity']['after']['standard_error']:.4f}" in page.text


def test_predictions_that_cannot_be_compared(place: Path) -> None:
    neuronrank("report", "pruned", "--eval-windows", 0, "--new-tokens", 0, "--save", "unmeasured.html")
    assert "Not shown. Set --eval-windows above 0" in Page(place / "unmeasured.html").text
    edited(place, "moved", lambda run: run["job"]["evaluation"].update(dataset="gone.txt"))
    neuronrank("report", "moved", "--new-tokens", 0, "--save", "moved.html")
    assert "cannot be compared with the original model's: file not found: gone.txt" in Page(place / "moved.html").text


def test_another_text_than_the_statistics(place: Path) -> None:
    other = place / "other.txt"
    other.write_text("Something else. " * 50, encoding="utf-8")
    arguments = ["--stats", "stats", "--dataset", other, "--new-tokens", 0, "--nr-tfidf-k", 4, "--save", "other.html"]
    data = json.loads(neuronrank("report", "pruned", *arguments, "--json").stdout)
    assert passages(data) == []
    assert all(topic["words"] == [] for layer in data["topics"]["layers"] for topic in layer["topics"])
    page = Page(place / "other.html")
    assert f"Passages: {other} is not the text" in page.text


def test_removed_neurons_and_doc_mode(place: Path) -> None:
    arguments = ["--stats", "stats", "--nr-tfidf-mode", "doc", "--new-tokens", 2, "--save", "smaller.html"]
    data = json.loads(neuronrank("report", "smaller", *arguments, "--json").stdout)
    assert data["sparsity"]["layers"][0]["modules"]["gate_proj"] == {"size": 48 * 32, "zeros": 0}
    page = Page(place / "smaller.html")
    assert "gate_proj, up_proj, down_proj: 25.00% in each of 3 layers." in page.text
    assert not [a for tag, a in page.elements if tag == "rect" and a.get("class") == "bar"]
    assert "Whole neurons were removed" in page.text
    assert "Weights removed" in page.text
    assert "25.00% of the pruned modules: 4,608 of 18,432 weights" in page.text
    assert "removed weights take no space" in page.text
    assert "zeros take" not in page.text
    assert "each sequence as a group" in page.text
    assert "add --nr-tfidf-mode topic" in page.text


def test_removed_layers_are_named_as_the_original_model_numbers_them(place: Path) -> None:
    arguments = ["--stats", "stats", "--new-tokens", 2, "--save", "shallower.html"]
    data = json.loads(neuronrank("report", "shallower", *arguments, "--json").stdout)
    gone = [layer["layer"] for layer in data["run"]["layers"] if layer["modules"]["layer"]["removed"]]
    size = data["run"]["layers"][0]["modules"]["layer"]["size"]
    assert gone == [1]
    rows = [(row["layer"], row["modules"]["layer"]["size"]) for row in data["sparsity"]["layers"]]
    assert rows == [(layer, 0 if layer in gone else size) for layer in range(3)]
    page = Page(place / "shallower.html")
    assert f"layer {gone[0]}: 100.00%" in page.text
    assert f"33.33% of the pruned modules: {size:,} of {3 * size:,} weights" in page.text
    assert "statistics are compared layer by layer" in page.text
    assert "neuronrank_wanda:" not in page.text  # No method scores layers.


def test_weights_that_were_changed_since_the_run_are_named(place: Path) -> None:
    shutil.copytree("pruned", "touched")
    file = place / "touched" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][0] = 1.0
    save_file(weights, file, metadata={"format": "pt"})
    neuronrank("report", "touched", "--new-tokens", 0, "--save", "touched.html")
    assert "differ from the figures in neuronrank.json in layer 1:" in Page(place / "touched.html").text
    neuronrank("report", "pruned", "--new-tokens", 0, "--save", "whole.html")
    assert "differ from the figures" not in Page(place / "whole.html").text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pruned", "--save", "report.html"], "Error: report.html already exists"),
        (["pruned", "--save", "pruned"], "Error: pruned is a folder"),
        (["pruned", "--save", "no/report.html"], "Error: cannot write no/report.html: there is no folder no"),
        (["<b>tiny", "--save", "new.html"], "Error: <b>tiny has no neuronrank.json"),
        (["pruned", "--device", "2:4", "--save", "new.html"], "Error: device 2:4 is not available"),
        (["pruned", "--stats", "nowhere", "--save", "new.html"], "Error: nowhere is not a statistics folder"),
        (["pruned", "--model", "nowhere.gguf", "--save", "new.html"], "Error: model not found: nowhere.gguf"),
        (["pruned", "--stats", "stats", "--dataset", "no.txt", "--save", "new.html"], "Error: file not found: no.txt"),
        (["pruned", "--stats", "stats", "--nr-tfidf-k", 9999, "--save", "new.html"], "Error: --nr-tfidf-k is 9999"),
    ],
)
def test_mistakes(made: tuple[Path, dict[str, Any]], place: Path, arguments: list[object], message: str) -> None:
    before = made[0].read_bytes()
    result = neuronrank("report", *arguments, code=2)
    assert message in result.stderr
    assert not (place / "new.html").exists()
    assert made[0].read_bytes() == before


def edited(place: Path, name: str, change: Any) -> None:
    """A copy of the pruned model whose ``neuronrank.json`` was edited."""
    shutil.copytree(place / "pruned", place / name)
    file = place / name / "neuronrank.json"
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def test_figures_come_from_the_tensors_whatever_neuronrank_json_says(place: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["total"] = dict.fromkeys(content["total"], 12345678)
        content["layers"][1]["modules"]["up_proj"] |= {"zeros": 7654321, "size": 23456789, "removed": 11}
        for layer in content["layers"]:
            layer["modules"]["up_proj"]["sparsity"] = 0.987654

    edited(place, "edited", change)
    neuronrank("report", "edited", "--new-tokens", 0, "--save", "edited.html")
    neuronrank("report", "pruned", "--new-tokens", 0, "--save", "unedited.html")
    page, unedited = Page(place / "edited.html").text, Page(place / "unedited.html").text
    for wrong in ("12,345,678", "12.3 M", "7,654,321", "23,456,789", "98.7"):
        assert wrong not in page
    warning = "The weights differ from the figures in neuronrank.json in layer 1: the files were changed after the run."
    assert warning in page
    assert re.sub(r"\bedited\b", "pruned", page.replace(warning, "")).split() == unedited.split()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda run: run["layers"][2]["modules"]["up_proj"].pop("zeros"),
            "layers.2.modules.up_proj.zeros: Field required",
        ),
        (lambda run: run.pop("recipe"), "recipe: Field required"),
        (lambda run: run.update(seconds="long"), "seconds: Input should be a valid number"),
        (lambda run: run["total"].update(zeros=1.5), "total.zeros: Input should be a valid integer"),
        (lambda run: run.update(layers={}), "layers: Input should be a valid array"),
        (lambda run: run["recipe"].update(method="guess"), "recipe.method is 'guess', allowed: one of"),
        (
            lambda run: run["job"]["evaluation"].update(bos="no"),
            "job.evaluation.bos: Input should be 'window' or 'text'",
        ),
    ],
)
def test_a_malformed_neuronrank_json(place: Path, tmp_path: Path, change: Any, says: str) -> None:
    name = f"malformed-{tmp_path.name}"
    edited(place, name, change)
    result = neuronrank("report", name, "--new-tokens", 0, "--save", "new.html", code=2)
    assert f"Error: cannot read {name}/neuronrank.json: {says}" in result.stderr
    assert not (place / "new.html").exists()


def test_a_neuronrank_json_of_another_version(place: Path) -> None:
    edited(place, "newer", lambda run: run.update(schema=2))
    result = neuronrank("report", "newer", "--new-tokens", 0, "--save", "new.html", code=2)
    assert "Error: newer/neuronrank.json has schema 2, newer than 1" in result.stderr

    def older(run: dict[str, Any]) -> None:
        """As version 0 wrote it: with a checksum, and without what had no value."""
        del run["schema"], run["plan"], run["perplexity"], run["job"]["dry_run"], run["calibration"]["statistics"]
        run["checksum"] = "0" * 64

    edited(place, "older", older)
    neuronrank("report", "older", "--new-tokens", 0, "--save", "older.html")
    assert "The run did not measure it" in Page(place / "older.html").text


def test_statistics_of_another_model_are_refused(place: Path) -> None:
    shutil.copytree("stats", "foreign")
    header = read_sealed(place / "foreign" / "statistics.json", "")
    header["fingerprint"] = {"model.safetensors": "another"}
    (place / "foreign" / "statistics.json").write_text(json.dumps(seal(header)))
    result = neuronrank("report", "pruned", "--stats", "foreign", "--save", "new.html", code=2)
    assert "statistics of another model" in result.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser of the system."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--no-sandbox"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(made: tuple[Path, dict[str, Any]], browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, noise, requests = context.new_page(), [], []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("dialog", lambda dialog: noise.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(made[0].as_uri())
    for summary in page.locator("summary").all():
        if not summary.evaluate("s => s.parentElement.open"):
            summary.click()
    assert noise == []
    assert requests == [made[0].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("svg").count() == 4 + 2
    assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 250)")
    assert page.locator("h1").inner_text().endswith("/<b>tiny")
    assert worst_contrast(page) >= 4.5
    # The matrix is read without scrolling, on the screen of a phone as on paper.
    around = page.locator(".scroll:has(.matrix)")
    assert around.evaluate("e => e.scrollWidth <= e.clientWidth")
    page.emulate_media(media="print")
    assert around.evaluate("e => e.scrollWidth <= e.clientWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 249)"
    assert page.evaluate("getComputedStyle(document.querySelector('.matrix td')).printColorAdjust") == "exact"
    context.close()


def worst_contrast(page: Any) -> float:
    """The lowest contrast (WCAG 2) of any text on the page with what is behind it."""
    ratio: float = page.evaluate(
        """() => {
        const parse = s => s.startsWith("color(srgb")
            ? s.match(/[\\d.]+/g).map((v, i) => i < 3 ? 255 * v : +v) : s.match(/[\\d.]+/g).map(Number);
        const light = c => c.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = e => {
            for (; e; e = e.parentElement) {
                const c = parse(getComputedStyle(e).backgroundColor);
                if (c.length < 4 || c[3] > 0.99) return c;
            }
            return [255, 255, 255];
        };
        const texts = [...document.querySelectorAll("body *")].filter(
            e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length);
        return Math.min(...texts.map(e => {
            const style = getComputedStyle(e);
            const a = light(parse(e.tagName === "text" ? style.fill : style.color)), b = light(behind(e));
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }));
    }"""
    )
    return ratio


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", "go", "--new-tokens", 511], "--new-tokens is 511, allowed: [0, 510] after a prompt of 2 tokens"),
        (["--prompt", "go", "--new-tokens", 10**12], "--new-tokens is 1000000000000, allowed: [0, 510]"),
        (["--prompt", ""], "--prompt is '', allowed: a text that has tokens"),
    ],
)
@pytest.mark.usefixtures("place")
def test_text_that_the_model_cannot_write(tmp_path: Path, flags: list[object], says: str) -> None:
    result = neuronrank("report", "pruned", *flags, "--save", tmp_path / "x.html", code=2)
    assert f"Error: {says}" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("place")
def test_flags_without_effect_are_named() -> None:
    idle = ["--dataset", "nope.txt", "--nr-tfidf-k", 7, "--layers", 2, "--prompt", "hi", "--new-tokens", 0]
    error = neuronrank("report", "pruned", *idle, "--eval-windows", 0, "--save", "idle.html").stderr
    for flag in ("--dataset", "--nr-tfidf-k", "--layers"):
        assert f"Warning: {flag} has no effect without --stats" in error
    assert "Warning: --prompt has no effect with --new-tokens 0" in error


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("flags", [["--stats", "nowhere"], ["--stats", "stats", "--nr-q-active", 2], ["--prompt", ""]])
def test_what_cannot_be_used_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, flags: list[object]) -> None:
    monkeypatch.setattr(gather, "measure_pair", lambda *_, **__: pytest.fail("measured"))
    neuronrank("report", "pruned", *flags, "--save", "early.html", code=2)


@pytest.mark.usefixtures("place")
def test_statistics_of_another_signal_say_nothing_of_the_methods(tmp_path: Path) -> None:
    folder = tmp_path / "gate"
    common = ["--model", "<b>tiny", "--dataset", "<i>text.txt", *BUDGET, "--propagate", "dense", "--seed", 5]
    neuronrank("prune", *common, "--prune_method", "neuronrank_tfidf", "--nr-signal", "product", "--save", folder)
    flags = ["--stats", "stats", "--eval-windows", 0, "--new-tokens", 0, "--save", tmp_path / "page.html", "--json"]
    missing = json.loads(neuronrank("report", folder, *flags).stdout)["agreement"]["missing"]
    assert missing.startswith("The run had signal product, the statistics were collected with gate")
    neuronrank("report", folder, "--new-tokens", 0, "--save", tmp_path / "bare.html")
    suggested = html.unescape((tmp_path / "bare.html").read_text("utf-8"))
    [command] = re.findall(r"neuronrank (collect .*)\n", suggested)
    assert "--nr-signal product" in command
    assert "--seed 5" in command
    neuronrank(*shlex.split(command)[:-1], tmp_path / "matching")
    flags = ["--stats", tmp_path / "matching", *flags[2:], "--force"]
    kept = json.loads(neuronrank("report", folder, *flags).stdout)["agreement"]
    own = kept["methods"].index("neuronrank_tfidf")
    assert kept["kept"][0][own] == pytest.approx(1.0, abs=0.01)
