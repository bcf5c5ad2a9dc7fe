"""Results as JSON and back: a result is a frozen dataclass whose fields are the keys of the JSON object."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from neuronrank_core.errors import InputError

Result = TypeVar("Result")


def to_json(result: Any) -> Any:
    """A result as JSON has it: objects, arrays, numbers and strings."""
    return json.loads(json.dumps(result, default=asdict, allow_nan=False))


def from_json(kind: type[Result], content: Mapping[str, Any], file: object, hint: str) -> Result:
    """Read a result from a JSON object; keys that it does not have are ignored.

    Parameters
    ----------
    kind : type
        Dataclass of the result. Fields with a default may be missing.
    content : mapping
    file : path
        Where the object comes from.
    hint : str
        What to do if it cannot be read.

    Raises
    ------
    InputError
        If a field is missing or of the wrong type, or the object has a newer schema. Names the file and the field.
    """
    schema, known = content.get("schema", 0), getattr(kind, "schema", 0)
    if isinstance(schema, int) and schema > known:
        raise InputError(f"{file} has schema {schema}, newer than {known}", hint="upgrade neuronrank")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"cannot read {file}: {where}: {first['msg']}", hint=hint) from error
