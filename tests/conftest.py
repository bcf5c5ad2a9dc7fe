"""Settings shared by every test."""

import signal

from hypothesis import settings

settings.register_profile("neuronrank", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("neuronrank")

# A background job of a non-interactive shell (`make test &`) ignores SIGINT, and so would every process that it starts:
# pytest itself, the workers of xdist, the programs under test and the server that forks ranks.
signal.signal(signal.SIGINT, signal.default_int_handler)
