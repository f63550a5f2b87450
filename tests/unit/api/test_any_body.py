"""Whatever JSON a client sends, the answer is a success or names the client's mistake; never a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxd.api.openai.schema import ChatCompletionRequest, CompletionRequest
from mlxd.api.tokenize import DetokenizeRequest, TokenizeRequest
from tests.unit.api.fakes import FakeEngine, call, make_app, sse_json

SCHEMAS = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

APP = make_app(FakeEngine())

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "user", "assistant", "text", "default", "auto", "none"])
    | st.text(max_size=8)
)
keys = st.sampled_from(
    ["role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "include_usage", "1"]
) | st.text(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
        optional={
            "content": st.text(max_size=8) | st.lists(st.fixed_dictionaries({"type": st.just("text")})),
            "tool_calls": values,
        },
    ),
    max_size=3,
)


def bodies(path: str) -> st.SearchStrategy[Any]:
    fields = dict.fromkeys(SCHEMAS[path].__struct_encode_fields__, values)
    likely: dict[str, st.SearchStrategy[Any]] = {"messages": messages, "prompt": st.text(max_size=8)}
    return st.one_of(
        values,
        st.fixed_dictionaries({}, optional=fields),
        *(
            st.fixed_dictionaries(
                {name: strategy},
                optional={n: v for n, v in fields.items() if n not in ("messages", "prompt")},
            )
            for name, strategy in likely.items()
            if name in fields
        ),
    )


@pytest.mark.parametrize("path", SCHEMAS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_json_is_answered_well(path: str, data: st.DataObject) -> None:
    body = data.draw(bodies(path))
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    response = call(APP, "POST", path, content=content)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
    elif isinstance(body, dict) and body.get("stream"):
        assert all("error" not in chunk for chunk in sse_json(response.content))


@pytest.mark.parametrize("path", SCHEMAS)
@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=64))
def test_any_bytes_are_answered_well(path: str, content: bytes) -> None:
    assert call(APP, "POST", path, content=content).status_code in (200, 400, 404)
