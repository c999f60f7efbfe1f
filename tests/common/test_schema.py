"""Values from files: parsed within limits, and compared with their type."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pytest

from tinyfm.common import files, schema


@dataclass(frozen=True)
class Inner:
    width: int = 1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    sizes: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    inner: Inner = Inner()
    path: str | None = None
    rate: float = 0.5
    on: bool = False

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate is {self.rate}; it must be 0 or above")


class Entry(TypedDict):
    bytes: int
    sha256: str


def test_values_of_the_right_shape():
    value = {"sizes": [1, 2], "pair": [3, 4], "inner": {"width": 5}, "path": None, "rate": 1}
    found = schema.check(value, Outer, "a.json")
    assert found == Outer((1, 2), (3, 4), Inner(5), None, 1)
    assert schema.check(json.loads(json.dumps(dataclasses.asdict(found))), Outer, "") == found
    manifest = {"x": {"bytes": 1, "sha256": "f", "more": []}}
    assert schema.check(manifest, dict[str, Entry], "") == manifest
    assert schema.check([[1], {}], Any, "") == [[1], {}]


WRONG = [
    ([], Outer, "a.json is []; expected an object"),
    ({"wings": 2}, Outer, "a.json: there is no field wings"),
    ({"sizes": 1}, Outer, "a.json: sizes is 1; expected a list"),
    ({"sizes": [1, 0.5]}, Outer, "a.json: sizes[1] is 0.5; expected a whole number"),
    ({"sizes": [True]}, Outer, "a.json: sizes[0] is True; expected a whole number"),
    ({"sizes": [2**53 + 1]}, Outer, "a.json: sizes[0] is 9007199254740993; expected a whole"),
    ({"pair": [1]}, Outer, "a.json: pair is of length 1; expected 2"),
    ({"inner": {"width": "x" * 99}}, Outer, 'a.json: inner.width is "xxx'),
    ({"inner": {"kind": "c"}}, Outer, "a.json: inner.kind is \"c\"; expected one of 'a', 'b'"),
    ({"path": 1}, Outer, "a.json: path is 1; expected a text or null"),
    ({"rate": "0.1"}, Outer, 'a.json: rate is "0.1"; expected a finite number'),
    ({"rate": float("inf")}, Outer, "a.json: rate is inf; expected a finite number"),
    ({"rate": -1}, Outer, "a.json: rate is -1; it must be 0 or above"),
    ({"on": 1}, Outer, "a.json: on is 1; expected true or false"),
    ({"x": {"bytes": 1}}, dict[str, Entry], "a.json: x: sha256 is missing"),
    ({"x": {"bytes": None}}, dict[str, Entry], "a.json: x.bytes is None; expected a whole"),
]


@pytest.mark.parametrize(("value", "kind", "message"), WRONG)
def test_values_of_another_shape(value, kind, message):
    with pytest.raises(ValueError) as error:
        schema.check(value, kind, "a.json")
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    "text",
    ["[" * 65 + "]" * 65, "[" * 10**6, '{"a":' * 10**5, "9" * 20, "-" + "9" * 5000, "1e999", "NaN"],
)
def test_json_beyond_the_limits(text):
    with pytest.raises(ValueError):
        schema.parse_json(text)


def test_a_key_that_occurs_twice_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": [{"rate": 1, "b": 2, "rate": 3}]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json.*'rate' occurs twice"):
        files.read_json(path)


def test_json_within_the_limits(tmp_path):
    deep = "[" * 64 + "]" * 64
    assert json.dumps(schema.parse_json(deep)) == deep
    assert schema.parse_json(b'\xef\xbb\xbf{"a": -9223372036854775808}') == {"a": -(2**63)}
    path = tmp_path / "a.json"
    path.write_text('{"val_loss": "low"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r'a\.json: val_loss is "low"; expected a finite number'):
        files.read_record(path, dict[str, float])
    with pytest.raises(ValueError, match=r"a\.json .* more than 5 bytes"):
        files.read_json(path, largest=5)
    with pytest.raises(ValueError, match="no regular file"):
        files.read_json(tmp_path)
