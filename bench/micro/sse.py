"""What a streamed delta costs in framing: `python -m bench.micro.sse`. It knows no dialect and no socket.

Deltas are what one token gives (a word, a quote and a newline, an emoji), and a page of text, as an answer
that is not streamed has. One row has orjson in the twin's place, which encodes the whole chunk anew for each
delta.
"""

from __future__ import annotations

from functools import partial

import orjson

from bench.micro.report import Case, report
from mlxd._ext import sse as extension
from tests.reference import sse as twin

PREFIX = (
    b'{"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"HuggingFaceTB/SmolLM2-135M-Instruct","system_fingerprint":"fp_0123456789","choices":[{"index":0,'
    b'"delta":{"content":"'
)
SUFFIX = b'"},"logprobs":null,"finish_reason":null}],"usage":null}'
DELTAS = {"a word": " capital", "quote, newline": '."\n\n', "emoji": " 😀"}
PAGE = "The capital of France is Paris. “Paris” has 2.1 million people.\n" * 64


def cases() -> list[Case]:
    ours, plain = extension.TextFrame(PREFIX, SUFFIX), twin.TextFrame(PREFIX, SUFFIX)
    chunk = orjson.loads(PREFIX + SUFFIX)

    def by_orjson(delta: str) -> bytes:
        chunk["choices"][0]["delta"]["content"] = delta
        return b"data: %b\n\n" % orjson.dumps(chunk)

    found = [
        Case(f"TextFrame.encode, {name}", partial(ours.encode, delta), partial(plain.encode, delta))
        for name, delta in DELTAS.items()
    ]
    body = PREFIX + SUFFIX
    return [
        *found,
        Case(
            "the same word, against orjson.dumps",
            lambda: ours.encode(" capital"),
            lambda: by_orjson(" capital"),
        ),
        Case(
            f"escape_json, {len(PAGE)} characters",
            partial(extension.escape_json, PAGE),
            partial(twin.escape_json, PAGE),
        ),
        Case("frame", partial(extension.frame, body), partial(twin.frame, body)),
        Case("event_frame", partial(extension.event_frame, "x", body), partial(twin.event_frame, "x", body)),
    ]


if __name__ == "__main__":
    report("micro.sse", cases())
