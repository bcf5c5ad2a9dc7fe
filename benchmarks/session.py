"""Records the terminal session of the first page, as SVG.

    python benchmarks/session.py

Runs the commands below in an empty folder and writes what they print on stdout to ``docs/measured/session.svg``. Takes
a minute or two. Needs nothing but the package.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

ROOT = Path(__file__).parents[1]
WIDTH = 100
COMMANDS = (
    "neuronrank prune --model builtin:smollm2-135m --nsamples 8 --seqlen 128 --dtype bfloat16 \\\n"
    "      --sparsity_ratio 0.4 --eval --eval-windows 4 --sample --save out/smollm2-50",
    'echo "What is the capital of France?" | \\\n'
    "      neuronrank chat builtin:smollm2-135m out/smollm2-50 --max-new-tokens 24",
)
#: The format of rich, without the fonts that it would load from the network.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
#: A terminal of this width, without what the shell of the caller sets.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("NEURONRANK_")}


def record(folder: Path) -> str:
    """Run the commands in a folder; returns the picture of the session."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    program = f'neuronrank() {{ "{sys.executable}" -m neuronrank_cli "$@"; }}\n'
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        done = subprocess.run(
            ["bash", "-c", program + command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        console.print(f"$ {command}", style="bold", markup=False, soft_wrap=True)
        console.print(done.stdout.rstrip(), markup=False)
    return console.export_svg(title="NeuronRank", code_format=FORMAT, unique_id="session")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        picture = record(Path(scratch))
    (ROOT / "docs/measured/session.svg").write_text(picture, encoding="utf-8")
