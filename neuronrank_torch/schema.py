"""Results as JSON and back: a result is a frozen dataclass whose fields are the keys of the JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from neuronrank_core.errors import InputError, InvalidValueError

Result = TypeVar("Result")
_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}


def to_json(value: Any) -> Any:
    """Plain JSON types: dataclasses and mappings become objects, tuples become arrays."""
    if is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


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
    schema = content.get("schema", 0)
    known = next((f.default for f in fields(kind) if f.name == "schema"), 0)  # type: ignore[arg-type]
    if isinstance(schema, int) and isinstance(known, int) and schema > known:
        raise InputError(f"{file} has schema {schema}, newer than {known}", hint="upgrade neuronrank")
    try:
        result: Result = _read(kind, content, "")
    except _MismatchError as error:
        raise InputError(f"cannot read {file}: {error}", hint=hint) from error
    return result


class _MismatchError(Exception):
    """A value that does not fit the schema."""


def _read(kind: Any, value: Any, name: str) -> Any:
    """A JSON value as an instance of a type; ``name`` leads to it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _read_union(arguments, value, name)
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _read_dataclass(kind, value, name)
    if origin is dict and isinstance(value, Mapping):
        return {key: _read(arguments[1], item, _within(name, key)) for key, item in value.items()}
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_read(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is Literal and value in arguments:
        return value
    simple = kind in _WORDS and isinstance(value, (int, float) if kind is float else kind)
    if simple and (kind is bool or not isinstance(value, bool)):  # Python's booleans are integers.
        return value
    raise _MismatchError(f"{name or 'the content'} is {_shown(value)}, expected {_described(kind)}")


def _read_union(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    for kind in kinds[:-1]:
        try:
            return _read(kind, value, name)
        except _MismatchError:
            continue
    return _read(kinds[-1], value, name)


def _read_dataclass(kind: Any, content: Mapping[str, Any], name: str) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for f in fields(kind):
        if f.init and f.name in content:
            values[f.name] = _read(hints[f.name], content[f.name], _within(name, f.name))
        elif f.init and f.default is MISSING and f.default_factory is MISSING:
            raise _MismatchError(f"{_within(name, f.name)} is missing")
    try:
        return kind(**values)
    except InvalidValueError as error:
        raise _MismatchError(_within(name, str(error))) from error


def _within(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, Mapping) else "an array" if isinstance(value, list) else repr(value)


def _described(kind: Any) -> str:
    if is_dataclass(kind) or get_origin(kind) is dict:
        return "an object"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    return "an array" if get_origin(kind) in (tuple, list) else _WORDS.get(kind, str(kind))
