"""Which upstream a model belongs to."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import Route, Router, UnknownUpstreamError, UpstreamModels

UPSTREAMS = {
    "nvidia": UpstreamModels(["nvidia/*", "meta/llama-3.?"], {"fast": "nvidia/nano", "odd": "x"}, ["local", "spare"]),
    "local": UpstreamModels(["*qwen*"], {"nvidia/nano": "qwen-small"}),
    "spare": UpstreamModels(),
}


@pytest.mark.parametrize(
    ("model", "routes"),
    [
        ("nvidia/big", [Route("nvidia"), Route("local"), Route("spare")]),
        ("fast", [Route("nvidia", "nvidia/nano"), Route("local"), Route("spare")]),
        ("nvidia/nano", [Route("local", "qwen-small")]),
        ("my-qwen-7b\n", [Route("local")]),
        ("meta/llama-3.?", [Route("nvidia"), Route("local"), Route("spare")]),
        ("meta/llama-3.1", [Route("spare")]),
        ("NVIDIA/big", [Route("spare")]),
        (None, [Route("spare")]),
    ],
)
def test_a_model_leads_to_an_upstream(model: str | None, routes: list[Route]) -> None:
    assert Router(UPSTREAMS, "spare").find(model) == routes


@given(st.text("ab*", max_size=8), st.text("ab", max_size=12))
def test_a_star_stands_for_any_characters(pattern: str, model: str) -> None:
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), model) is not None
    assert bool(Router({"a": UpstreamModels([pattern])}, None).find(model)) is expected


def test_no_name_of_a_model_takes_long() -> None:
    router = Router({"a": UpstreamModels(["*llama*instruct*fp8"])}, None)
    assert router.find("llamainstruct" * 100_000) == []


def test_without_a_default_an_unknown_model_has_no_upstream() -> None:
    assert Router(UPSTREAMS, None).find("unknown") == []
    assert Router(UPSTREAMS, None).find(None) == []


def test_a_request_may_name_its_upstream() -> None:
    assert Router(UPSTREAMS, None).find("nvidia/big", "spare") == [Route("spare")]
    assert Router(UPSTREAMS, None).find(None, "local") == [Route("local")]
    with pytest.raises(UnknownUpstreamError):
        Router(UPSTREAMS, "spare").find("fast", "nowhere")


def test_a_pattern_takes_linear_time() -> None:
    assert Router({"a": UpstreamModels(["*a*a*a*a*b"])}, None).find("a" * 200) == []
