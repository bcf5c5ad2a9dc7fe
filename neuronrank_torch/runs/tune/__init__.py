"""Search for a better recipe with statistics that were collected before: what ``neuronrank tune`` does."""

from neuronrank_core import InputError


def require_optuna() -> None:
    """Raise InputError if the package for the search is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError("tuning needs the package optuna", hint="pip install 'neuronrank[tune]'") from error
