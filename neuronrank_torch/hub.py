"""The Hugging Face hub: uploads, and what goes wrong, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import logging
from huggingface_hub.utils._validators import validate_repo_id

from neuronrank_core.errors import InputError, NeuronRankError, first_line

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


def check_repository(name: str) -> None:
    """Refuse a name that no repository on the hub can have.

    Raises
    ------
    InputError
    """
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise InputError(f"--push-to-hub: {first_line(error)}", hint="for example --push-to-hub USER/NAME") from error


def push_folder(folder: str, name: str) -> str:
    """Upload a folder to a model repository, which is created (private) if it does not exist; return its address.

    Raises
    ------
    NeuronRankError
        If that fails. The folder is not changed.
    """
    api = HfApi()
    try:
        with quiet_hub():
            api.create_repo(name, private=True, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Pruned by NeuronRank")
    except Exception as error:  # Anything from a missing login to a lost connection.
        raise NeuronRankError(
            f"could not push to {name}: {hub_reason(error)}",
            hint=f"the model is saved in {folder}; after `hf auth login`: hf upload {name} {folder}",
        ) from error
    return f"https://huggingface.co/{name}"
