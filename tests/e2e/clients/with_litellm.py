"""litellm against mlxd, in both dialects: PYTHON with_litellm.py URL LIMITED_URL BUSY_URL."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm would fetch it from the network

import litellm

URL, LIMITED_URL, BUSY_URL = sys.argv[1:]
litellm.suppress_debug_info = True

TEXT = "Plain “words”, 日本語, 🙂\n"
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
DIALECTS = {"openai/default": "/v1", "anthropic/default": ""}


def asked(model: str, text: str, url: str = URL, **fields: object) -> dict[str, object]:
    return {
        "model": model,
        "api_base": url + DIALECTS[model],
        "api_key": "none",
        "max_tokens": 1000,
        "messages": [{"role": "user", "content": f"Say: <<<play>>>{text}<<<end>>>"}],
        "num_retries": 0,
        **fields,
    }


def raises(expected: type[Exception], fields: dict[str, object], times: int = 1) -> None:
    try:
        for _ in range(times):
            litellm.completion(**fields)
    except expected:
        return
    raise AssertionError(f"no {expected.__name__}")


async def streamed(model: str) -> str:
    chunks = await litellm.acompletion(**asked(model, TEXT, stream=True))
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


for model in DIALECTS:
    whole = litellm.completion(**asked(model, TEXT))
    assert whole.choices[0].message.content == TEXT, whole
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(TEXT.encode()) + 1
    assert asyncio.run(streamed(model)) == TEXT

    called = litellm.completion(**asked(model, CALL, tools=[TOOL]))
    [call] = called.choices[0].message.tool_calls
    assert (call.function.name, called.choices[0].finish_reason) == ("get_weather", "tool_calls")
    chunks = list(litellm.completion(**asked(model, CALL, tools=[TOOL], stream=True)))
    rebuilt = litellm.stream_chunk_builder(chunks)
    for made in (call, rebuilt.choices[0].message.tool_calls[0]):
        assert json.loads(made.function.arguments) == {"city": "Zürich"}

    stopped = litellm.completion(**asked(model, "one two three", stop=["two"]))
    assert stopped.choices[0].message.content == "one "

    raises(litellm.BadRequestError, asked(model, "x", temperature=9))
    raises(litellm.NotFoundError, {**asked(model, "x"), "model": model.replace("default", "nobody")})
    raises(litellm.RateLimitError, asked(model, "x", LIMITED_URL), times=200)
    # Without a strategy litellm tries again at once, whatever retry-after says.
    patience = {"num_retries": 5, "retry_strategy": "exponential_backoff_retry"}
    patient = litellm.completion(**asked(model, "in", LIMITED_URL, **patience))
    assert patient.choices[0].message.content == "in"

print("litellm: ok")
