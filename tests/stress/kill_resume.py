"""Kills a real run at random moments, lets it go on, and compares what comes of it with a run that nobody killed.

    python tests/stress/kill_resume.py --kills 20 > kill_resume.jsonl

Everything after the flags of this program goes to ``neuronrank prune``. One line of JSON a kill on stdout: the moment,
how far the run was, and in the end whether the weights are the same, by SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click

DEFAULT = ("--model", "builtin:smollm2-135m", "--nsamples", "4", "--seqlen", "128")


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def layers_done(out: Path) -> int:
    """Finished layers of an unfinished run."""
    journal = out.with_name(f".{out.name}.partial") / "journal.json"
    return len(json.loads(journal.read_text())["shards"]) if journal.exists() else 0


@click.command(context_settings={"show_default": True, "ignore_unknown_options": True})
@click.option("--kills", default=20)
@click.option("--seed", default=0)
@click.option("--work", type=click.Path(path_type=Path), help="Where to save; a temporary folder by default.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def main(kills: int, seed: int, work: Path | None, flags: tuple[str, ...]) -> None:
    """Prune with FLAGS: once undisturbed, then killed so many times."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=work) as place:
        whole, out = Path(place, "whole"), Path(place, "out")
        command = [sys.executable, "-m", "neuronrank_cli", "prune", *(flags or DEFAULT), "--save"]
        started = time.perf_counter()
        subprocess.run([*command, str(whole)], check=True, capture_output=True)
        seconds = time.perf_counter() - started
        expected, rounds, same, killed = fingerprint(whole), 0, True, 0
        while killed < kills:
            moment = moments.uniform(0, seconds)
            with subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
                with suppress(subprocess.TimeoutExpired):
                    run.wait(moment)
                ended = run.poll()
                run.kill()
            if ended:
                raise click.ClickException(f"the run ended with exit code {ended}")
            if ended is None:
                killed += 1
                click.echo(json.dumps({"killed after": round(moment, 2), "layers done": layers_done(out)}))
            if out.exists():  # Whoever killed it: what is under the final name must be whole.
                same, rounds = same and compared(out, expected), rounds + 1
        if rounds == 0 or layers_done(out):
            subprocess.run([*command, str(out)], check=True, capture_output=True)
            same, rounds = same and compared(out, expected), rounds + 1
    click.echo(json.dumps({"kills": killed, "runs completed": rounds, "all bit-identical": same, "seconds": seconds}))
    sys.exit(not same)


def compared(out: Path, expected: dict[str, str]) -> bool:
    """Whether a finished run has the expected weights; it makes room for the next."""
    same = fingerprint(out) == expected
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    return same


if __name__ == "__main__":
    main()
