"""Search for a better recipe by statistics that were collected once: what ``neuronrank tune`` does."""

from neuronrank_core import InputError


def require_optuna() -> None:
    """Refuse to go on without the package that searches; raises InputError."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError("tuning needs the package optuna", hint="pip install 'neuronrank[tune]'") from error
