"""Several processes on the loopback interface, forked from a server that imports everything once."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

#: Seconds until processes that do not end fail a test.
LIMIT = 120
SERVER = get_context("forkserver")
PRELOADED = ["command", "neuronrank_torch.runs.dry_run", "transformers.models.llama.modeling_llama"]


@dataclass(frozen=True)
class Ended:
    """What is left of a process."""

    code: int | None
    stdout: str
    stderr: str


def together(size: int, folder: Path, work: Callable[..., None], *arguments: Any) -> list[Ended]:
    """Run ``work(*arguments)``, a function of a module, in so many processes that find each other as torchrun's do."""
    folder.mkdir(exist_ok=True)
    # Python 3.11's server does not look for modules where this process does.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        SERVER.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    members = [
        SERVER.Process(target=_member, args=(rank, size, port, folder, work, *arguments)) for rank in range(size)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(LIMIT)
    hanging = [rank for rank, member in enumerate(members) if member.is_alive()]
    for rank in hanging:
        members[rank].kill()
    assert not hanging, f"ranks that did not end: {hanging}"
    outputs = [[(folder / f"{name}-{rank}").read_text() for name in ("stdout", "stderr")] for rank in range(size)]
    return [Ended(member.exitcode, *output) for member, output in zip(members, outputs, strict=True)]


def _member(rank: int, size: int, port: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in found.items()})
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with (folder / f"{name}-{rank}").open("w") as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    work(*arguments)
