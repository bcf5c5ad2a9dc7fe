"""Whether a launcher such as torchrun started several processes; without importing torch."""

import os

#: Environment variables that torchrun, or another launcher, sets.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def several() -> bool:
    """Whether this is one of several processes."""
    return all(os.environ.get(name) for name in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def first() -> bool:
    """Whether this is the only process, or the first of several."""
    return not several() or int(os.environ["RANK"]) == 0
