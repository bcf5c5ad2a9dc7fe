"""What a user is told when the hub does not deliver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import logging

from neuronrank_core import InputError
from neuronrank_torch.hub import hub_reason, quiet_hub
from neuronrank_torch.model.source import locate


class ConnectError(Exception):
    """As the HTTP library names it, which depends on the version of the hub's client."""


class ReadTimeout(type("TimeoutException", (Exception,), {})):  # type: ignore[misc]
    """The same."""


def answered(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def behind(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


CASES = [
    (errors.GatedRepoError("403 Client Error.\n\nCannot access", response=answered(403)), "access to it is restricted"),
    (errors.RepositoryNotFoundError("401 Client Error.\n\n", response=answered(401)), "no repository of this name"),
    (errors.HfHubHTTPError("503 Server Error", response=answered(503)), "the hub answered 503"),
    (behind(errors.LocalEntryNotFoundError("x"), errors.OfflineModeIsEnabled("y")), "HF_HUB_OFFLINE is set"),
    (behind(errors.LocalEntryNotFoundError("x"), ConnectError("y")), "no connection to the hub"),
    (behind(errors.LocalEntryNotFoundError("x"), ReadTimeout("y")), "no connection to the hub"),
    (ValueError("first\nsecond"), "first"),
]


@pytest.mark.parametrize(("error", "says"), CASES, ids=lambda value: type(value).__name__)
def test_a_failure_of_the_hub_is_one_line(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    assert says in hub_reason(error)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        locate("org/model")
    start = "org/model is not a local folder and could not be downloaded: "
    assert str(caught.value).startswith(start)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_attempts_of_the_client_are_not_shown() -> None:
    before = logging.get_verbosity()
    with quiet_hub():
        assert not logging.get_logger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    assert logging.get_verbosity() == before
