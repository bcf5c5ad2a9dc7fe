"""What goes wrong with the Hugging Face hub, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR

from huggingface_hub import errors
from huggingface_hub.utils import logging

from neuronrank_core.errors import first_line

#: Kinds of failure: types of the error or of one of its causes, and what to say. The first that fits counts.
_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("GatedRepoError",), "access to it is restricted: accept its terms on its page, then `hf auth login`"),
    (("RepositoryNotFoundError",), "the hub has no repository of this name, or it is private (`hf auth login`)"),
    (("OfflineModeIsEnabled",), "HF_HUB_OFFLINE is set, and it is not in the cache"),
    (("ConnectError", "TimeoutException"), "no connection to the hub"),
)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Context without the warnings of the hub's client about each of its attempts."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def hub_reason(error: BaseException) -> str:
    """Why a request to the hub failed, in one line."""
    cause: BaseException | None = error
    names: set[str] = set()
    while cause is not None:
        names |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    found = next((text for kinds, text in _REASONS if names.intersection(kinds)), "")
    if not found and isinstance(error, errors.HfHubHTTPError):
        found = f"the hub answered {error.response.status_code}"
    return found or first_line(error)
