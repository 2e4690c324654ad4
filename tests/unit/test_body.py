"""Files leave a request's body as it arrives, and nothing else about the request changes."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.errors import BadRequest
from triptych.router import body as bodies
from triptych.router.body import BodyReader, Inline


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def read(raw: bytes, *cuts: int) -> BodyReader:
    """``raw`` in parts that end at ``cuts``."""
    reader = BodyReader()
    places = sorted({min(cut, len(raw)) for cut in cuts})
    for start, end in zip((0, *places), (*places, len(raw)), strict=True):
        reader.feed(raw[start:end])
    return reader


def every(size: int, raw: bytes) -> BodyReader:
    return read(raw, *range(size, len(raw), size))


def names_in(value: Any, reader: BodyReader) -> list[str]:
    """Strings of a parsed body that are names, depth first."""
    if isinstance(value, str):
        return [value] if value in reader.files else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for part in parts for name in names_in(part, reader)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 100, 1001])
def test_a_file_in_parts_of_any_size(size: int, length: int) -> None:
    data = bytes(range(256)) * 4
    raw = json.dumps({"a": [uri(data[:length]), {"url": uri(data)}], "b": "text"}).encode()
    reader = every(size, raw)
    found = json.loads(reader.text())
    assert [reader.files[name].data() for name in found["a"][:1]] == [data[:length]]
    assert reader.files[found["a"][1]["url"]].data() == data
    assert found["b"] == "text"
    assert json.loads(reader.restored()) == json.loads(raw)


@pytest.mark.parametrize("size", [1, 4, 6, 50, 10_000])
@pytest.mark.parametrize("slash", ["/", "\\/", "\\u002f", "\\u002F"])
@pytest.mark.parametrize("equals", ["=", "\\u003d"])
def test_escapes_that_some_clients_write(size: int, slash: str, equals: str) -> None:
    """PHP escapes slashes, Gson equals signs."""
    data = b"\xff\xff\xff\xfe??>" * 20  # much of its base64 is slashes
    written = json.dumps([uri(data)]).replace("=", equals)
    kind, encoded = written.split(",", 1)
    raw = f"{kind},{encoded.replace('/', slash)}".encode()
    assert json.loads(raw) == [uri(data)]
    reader = every(size, raw)
    assert names_in(json.loads(reader.text()), reader) == list(reader.files)
    assert [file.data() for file in reader.files.values()] == [data]


def test_types_of_any_form() -> None:
    for opening in ("data:;base64,", "DATA:Image/PNG;BASE64,", "data:a/b;charset=x;base64,"):
        reader = every(3, json.dumps([opening + "QUJD"]).encode())
        (file,) = reader.files.values()
        assert (file.data(), file.url) == (b"ABC", opening + "QUJD")
    reader = every(3, b'["data:image\\/png;base64,QUJD"]')
    assert [file.opening for file in reader.files.values()] == ["data:image/png;base64,"]


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
@pytest.mark.parametrize(
    "text",
    [
        '["data:;base64,@@@@"]', '["data:;base64,QUJ"]', '["data:;base64,QQ==QUJD"]',
        '["data:;base64,QUJD=="]', '["data:;base64,QUJD\\n"]', '["data:;base64,QUJD\\\\"]',
        '["data:;base64,QUJD\\u0022"]', '["data:;base64,QUJD\\"x"]', '["data:;base64,Q\\u12"]',
        '["data:;base64,QÜJD"]', '["data:image/png,abc"]', '["data:image/png;base64"]',
        '["say \\"data:;base64,QUJD\\" aloud"]', '["x\\\\\\"data:;base64,QUJD"]',
        '["data:;base64,' + "A" * 80 + "@" + "A" * 80 + '"]',
        '["data:;base64,' + "QQ==" * 40 + '"]',
        '["data:;base64,QUJD', '"data:;base64,', '["' + "data:" * 200 + '"]',
    ],
)  # fmt: skip
def test_what_is_no_file_is_put_back(size: int, text: str) -> None:
    reader = every(size, text.encode())
    assert reader.text().decode() == text
    assert reader.files == {}
    assert reader.restored().decode() == text


def test_a_file_within_a_longer_string_comes_back() -> None:
    """Where a part ends behind a backslash, the mark after it cannot be told from a beginning; the
    name then is no whole string, and the restored text is what was sent."""
    text = b'["data:;base64,QU\\"data:;base64,QUJD"]'
    for cut in range(len(text)):
        reader = read(text, cut)
        assert reader.restored() == text
        assert not names_in(json.loads(reader.text()), reader)


def test_bits_that_mean_nothing_are_kept() -> None:
    reader = every(2, b'["data:;base64,QUJDQR=="]')
    assert [file.data() for file in reader.files.values()] == [b"ABCA"]
    assert reader.restored() == b'["data:;base64,QUJDQR=="]'


def test_too_much_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_TEXT", 1000)
    every(100, json.dumps(["x" * 900, uri(b"y" * 5000)]).encode()).text()
    with pytest.raises(BadRequest, match="besides the files"):
        every(100, json.dumps(["x" * 5000]).encode())
    with pytest.raises(BadRequest, match="besides the files"):
        every(100, json.dumps([f"data:;base64,{'A' * 4000}@"]).encode())
    reader = every(100, json.dumps([uri(b"y" * 5000)]).encode())
    with pytest.raises(BadRequest, match="besides the files"):
        reader.restored()


def test_more_files_than_one_digit_numbers() -> None:
    raw = json.dumps([uri(bytes([n])) for n in range(12)]).encode()
    reader = every(50, raw)
    assert reader.restored() == raw
    assert not any(a != b and b.startswith(a) for a in reader.files for b in reader.files)


def test_names_cannot_be_known() -> None:
    first, second = (every(9, json.dumps([uri(b"abc")]).encode()) for _ in range(2))
    assert first.files.keys().isdisjoint(second.files)


def test_the_url_of_an_empty_file() -> None:
    assert Inline("data:;base64,", [], "").url == "data:;base64,"


strings = st.one_of(
    st.text(max_size=20),
    st.binary(max_size=40).map(uri),
    st.binary(max_size=9).map(lambda data: uri(data) + "!"),
    st.text('AQ=/\\"', max_size=12).map("data:;base64,".__add__),
    st.text('"\\data:;base64,Q', max_size=30),
)
values = st.recursive(
    strings | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=600, deadline=None)
@given(values, st.lists(st.integers(0, 400), max_size=12))
def test_any_json_in_any_parts(value: Any, cuts: list[int]) -> None:
    """Names put back for files, a parser sees what it would have seen."""
    raw = json.dumps(value).encode()
    reader = read(raw, *cuts)
    assert json.loads(reader.restored()) == value
    found = json.loads(reader.text())
    for name in names_in(found, reader):
        data = reader.files[name].data()
        assert base64.b64decode(reader.files[name].url.partition(",")[2]) == data


def unescaped(raw: bytes) -> bytes:
    def one(escape: re.Match[bytes]) -> bytes:
        try:
            return bodies._unescape(escape)
        except ValueError:
            return escape[0]

    return bodies._ESCAPE.sub(one, raw)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=120), st.lists(st.integers(0, 120), max_size=6))
def test_any_bytes_are_put_back(noise: bytes, cuts: list[int]) -> None:
    """But for escapes that base64 never needs: this string has no end, and no parser takes it."""
    raw = b'"data:;base64,' + noise
    assert unescaped(read(raw, *cuts).restored()) == unescaped(raw)
