"""Short JSON documents from elsewhere: whatever they contain, their texts can be stored, and nothing but ValueError is raised."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.payloads import decode_json, load_json

TEXT = st.text(st.characters(codec=None))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
)


@given(VALUES, st.booleans())
def test_all_texts_can_be_encoded(value: Any, escaped: bool) -> None:
    document = json.dumps(value, ensure_ascii=escaped)
    loaded = load_json(document.encode("utf-8", "surrogatepass"))
    repr(loaded).encode()
    assert json.dumps(loaded, ensure_ascii=False).encode() == document_without_surrogates(value)


def document_without_surrogates(value: Any) -> bytes:
    """Return the document with each lone surrogate replaced after it was written, keys that are equal then being one."""
    written = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return json.dumps(json.loads(written), ensure_ascii=False).encode()


@pytest.mark.parametrize("levels", [400, 900, 3000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_levels(levels: int, opening: str, closing: str) -> None:
    """A document either is refused, or has so few levels that it can also be written."""
    document = opening * levels + "1" + closing * levels
    try:
        loaded = load_json(document)
    except ValueError as error:
        assert str(error) == "the JSON document has too many levels"
        assert levels > 100
    else:
        assert json.loads(json.dumps(loaded)) == loaded
        assert str(loaded)


@pytest.mark.parametrize("end", [b" " * 500_000, b"\\", b'"]'])
def test_a_text_without_an_end_takes_no_longer(end: bytes) -> None:
    """It would take hours if its end were looked for from each quote in it."""
    body = b'["' + b"[" * 150_001 + b'","' + b'\\"' * 500_000 + end
    if end == b'"]':
        assert len(decode_json(body)[1]) == 500_000
        return
    with pytest.raises(ValueError, match="Unterminated string"):
        decode_json(body)
