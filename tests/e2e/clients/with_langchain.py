"""langchain-openai against mlxd: PYTHON with_langchain.py URL LIMITED_URL BUSY_URL."""

import asyncio
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, LIMITED_URL, BUSY_URL = sys.argv[1:]
TEXT = "Plain “words”, 日本語, 🙂\n"
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'


def connect(url: str = URL, **options: object) -> ChatOpenAI:
    options = {"max_retries": 0} | options
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="default", **options)


def played(text: str) -> str:
    return f"Say: <<<play>>>{text}<<<end>>>"


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


class Weather(BaseModel):
    """A forecast."""

    city: str
    degrees: int


chat = connect()
whole = chat.invoke(played(TEXT))
assert whole.content == TEXT and whole.response_metadata["finish_reason"] == "stop"
assert whole.usage_metadata["output_tokens"] == len(TEXT.encode()) + 1

chunks = list(connect(stream_usage=True).stream(played(TEXT)))
joined = chunks[0]
for chunk in chunks[1:]:
    joined += chunk
assert joined.content == TEXT
assert joined.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]

assert [answer.content for answer in chat.batch([played("a"), played("b")])] == ["a", "b"]


async def streamed() -> str:
    return "".join([chunk.content async for chunk in connect().astream(played(TEXT))])


assert asyncio.run(streamed()) == TEXT

with_tools = chat.bind_tools([get_weather])
called = with_tools.invoke(played(CALL))
[call] = called.tool_calls
assert (call["name"], call["args"]) == ("get_weather", {"city": "Zürich"})
result = get_weather.invoke(call)
assert isinstance(called, AIMessage) and isinstance(result, ToolMessage)
history = [HumanMessage("The weather?"), called, result, HumanMessage(played("Sunny."))]
assert with_tools.invoke(history).content == "Sunny."
[streamed_call] = [c for chunk in with_tools.stream(played(CALL)) for c in chunk.tool_calls if c["name"]]
assert streamed_call["name"] == "get_weather"

forecast = '<tool_call>{"name": "Weather", "arguments": {"city": "Bern", "degrees": 20}}</tool_call>'
structured = chat.with_structured_output(Weather, method="function_calling")
assert structured.invoke(played(forecast)) == Weather(city="Bern", degrees=20)

plain = OpenAI(base_url=f"{URL}/v1", api_key="none", model="default", max_retries=0)
assert plain.invoke(played(TEXT)) == TEXT

try:
    connect(temperature=9.0).invoke("x")
except openai.BadRequestError as error:
    assert error.param == "temperature"
else:
    raise AssertionError("no error")

try:
    for _ in range(200):
        connect(LIMITED_URL).invoke(played("x"))
except openai.RateLimitError:
    pass
else:
    raise AssertionError("no limit")
assert connect(LIMITED_URL, max_retries=4).invoke(played("in")).content == "in"

print("langchain-openai: ok")
