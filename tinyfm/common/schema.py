"""Values from files that others wrote: parsed with limits, and compared with their type.

A JSON file may hold anything: a list in place of an object, a number with a thousand digits, ten
thousand brackets. Code that expects something else fails late, in a place that names neither the
file nor the field, or it takes all memory. So a file is read in two steps:

    value = parse_json(text)                          # JSON within limits
    config = check(value, GPTConfig, "config.json")   # a GPTConfig, or ValueError

What is right is said by a type: int, float, str, bool, None, Literal, list[...], tuple[...],
dict[str, ...], unions, a TypedDict (an object with these keys, and perhaps others), or a dataclass
(an object with these keys only; the result is an instance).

This module imports the standard library only, so that worker processes start quickly.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, Literal, Union

JSON_BYTES = 1 << 24  # a JSON file is not larger, unless its reader allows it
DEPTH = 64  # of objects and lists in each other
DIGITS = 19  # of an integer: more do not fit into 64 bits
LARGEST = 2**53  # of integers: JSON's numbers are exact up to here in every language
UNIONS = (Union, types.UnionType)  # X | Y, as typing and as Python write it

# ---- parse ---------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:60]!r} occurs twice in one object")
            seen.add(key)
    return table


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        raise ValueError(f"{digits[:DIGITS]}... is too large a number")
    return int(digits)


def _lenient_integer(digits: str) -> int | float:
    return float(digits) if len(digits.lstrip("-")) > DIGITS else int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:DIGITS]} is no finite number")
    return number


def _check_depth(value: Any) -> None:
    """Raise ValueError if lists and objects are nested deeper than DEPTH."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if not isinstance(value, (dict, list)):
            continue
        if depth > DEPTH:
            raise ValueError(f"it is nested deeper than {DEPTH} levels")
        children = value.values() if isinstance(value, dict) else value
        waiting += [(child, depth + 1) for child in children if isinstance(child, (dict, list))]


def parse_json(text: str | bytes, non_finite: bool = False) -> Any:
    """The value of a JSON text. Bytes are UTF-8; a byte order mark is dropped.

    non_finite: accept NaN and infinity, which Python and JavaScript write although they are no
    JSON, and read an integer with too many digits as a float, as JavaScript does. Raises ValueError
    for them otherwise, for malformed JSON, a key that occurs twice, numbers that do not fit into 64
    bits, and nesting deeper than DEPTH.
    """
    number = float if non_finite else _number
    integer = _lenient_integer if non_finite else _integer
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_object,
            parse_int=integer,
            parse_float=number,
            parse_constant=number,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH} levels") from None
    _check_depth(value)
    return value


# ---- check ---------------------------------------------------------------------------------------

WORDS = {
    bool: "true or false",
    int: f"a whole number up to {LARGEST:,}",
    float: "a finite number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}


def describe(kind: Any) -> str:
    """A kind in words, for messages."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if origin in UNIONS:
        return " or ".join(describe(part) for part in typing.get_args(kind))
    return WORDS.get(origin or kind, "an object")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain kind, or the right container for the kind's parts."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        # 1 == True in Python, but not in JSON.
        return any(value == one and type(value) is type(one) for one in typing.get_args(kind))
    if origin in (list, tuple):
        return isinstance(value, (list, tuple))
    if origin is int:
        return type(value) is int and abs(value) <= LARGEST
    if origin is float:
        return type(value) in (int, float) and abs(value) < math.inf
    if origin in WORDS:
        return type(value) is origin
    return isinstance(value, dict)


@functools.cache
def fields_of(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass or a TypedDict."""
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return hints


def check_object(value: dict, kind: type, where: str) -> Any:
    """An object as a dataclass or a TypedDict."""
    fields = fields_of(kind)
    found = {}
    for name, content in value.items():
        if name in fields:
            found[name] = check(content, fields[name], join(where, name))
        elif dataclasses.is_dataclass(kind):
            raise ValueError(f"{where}: there is no field {shorten(name)}")
        else:
            found[name] = content
    if not dataclasses.is_dataclass(kind):
        missing = kind.__required_keys__ - found.keys()
        if missing:
            raise ValueError(f"{where}: {min(missing)} is missing")
        return found
    try:
        return kind(**found)
    except (ValueError, TypeError) as error:  # a check of the class; a field without a default
        raise ValueError(f"{where}: {error}") from error


def join(where: str, name: str | int) -> str:
    """`where` with one more field: "a.json" -> "a.json: model" -> "a.json: model.d_model"."""
    return f"{where}.{shorten(name, 40)}" if ": " in where else f"{where}: {shorten(name, 40)}"


def shorten(value: Any, length: int = 60) -> str:
    """A value for a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else text[:length] + "..."


def check(value: Any, kind: Any, where: str) -> Any:
    """The value, if it is of this kind. Tuples and dataclasses are made where the kind says so.

    where: the file, for the message. Raises ValueError with the file and the field otherwise.
    """
    origin = typing.get_origin(kind) or kind
    parts = typing.get_args(kind)
    if origin is Any:
        return value
    if origin in UNIONS:
        for part in parts:
            if fits(value, part):
                return check(value, part, where)
    if origin in UNIONS or not fits(value, kind):
        text = json.dumps(value) if isinstance(value, str) else value
        raise ValueError(f"{where} is {shorten(text)}; expected {describe(kind)}")
    if origin is dict:
        of = parts[1] if parts else Any
        return {name: check(one, of, join(where, name)) for name, one in value.items()}
    if origin not in (list, tuple):
        plain = origin in WORDS or origin is Literal
        return value if plain else check_object(value, kind, where)
    # A tuple has one kind for each of its values, unless it is tuple[kind, ...].
    if origin is tuple and parts and parts[-1] is not Ellipsis:
        if len(parts) != len(value):
            raise ValueError(f"{where} is of length {len(value)}; expected {len(parts)}")
    else:
        parts = (parts[0] if parts else Any,) * len(value)
    return origin(
        check(one, part, f"{where}[{i}]") for i, (one, part) in enumerate(zip(value, parts))
    )
