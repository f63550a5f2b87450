"""The web page in a real browser: chat, stop, tools, keys, hostile text, and the live status."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.server import ServerProcess
from tests.e2e import chromium
from tests.e2e.chromium import Browser, Page
from tests.e2e.sdk import played

BROWSER = chromium.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt install chromium, or set MLXD_CHROMIUM)"),
]

DONE = "document.querySelector('.assistant:last-child[aria-busy=false]')"
ANSWER = ".assistant:last-child"
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}},
}
HOSTILE = """# Title <img src=x onerror="window.hacked=1">

<script>window.hacked=1</script> **bold** and `code <b>`, snake_case_name

- one
  - two

| a | b |
|---|---|
| 1 | <i>2</i> |

[bad](javascript:window.hacked=1) [good](https://example.org/a_(b)) ![image](https://example.org/x.png)

```html
<script>window.hacked=1</script>
```"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert BROWSER is not None
    with Browser(BROWSER) as browser:
        yield browser


def ask(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("Enter")


def test_a_conversation_with_a_model(browser: Browser, smollm2: ServerProcess) -> None:
    page = browser.open(f"{smollm2.url}/")
    page.wait("document.querySelector('#state').textContent === 'running'")
    page.run("document.querySelector('#temperature').value = '0'")
    ask(page, "What is the capital of France?")
    page.wait(f"document.querySelector('{ANSWER} .text').innerText.length")
    page.wait(DONE, 60)
    assert "Paris" in page.text(f"{ANSWER} .text")
    assert "tokens/s" in page.text(f"{ANSWER} .facts")
    ask(page, "Write a very long story about the sea.")
    page.wait(f"document.querySelector('{ANSWER} .text').innerText.length > 20", 60)
    assert page.run("document.querySelector('#send').hidden")
    page.press("Escape")
    page.wait(DONE)
    assert "stopped" in page.text(f"{ANSWER} .facts")
    smollm2.wait_idle()
    page.run("document.querySelector('#max-tokens').value = '3'")
    page.click(f"{ANSWER} .regenerate")
    page.wait(
        f"document.querySelector('{ANSWER} .facts').textContent.includes('cut off at its token limit')", 60
    )
    assert page.run("document.querySelectorAll('.turn').length") == 4
    assert page.problems == []


def test_a_wrong_key_is_refused_in_the_servers_words_and_the_right_one_kept(
    browser: Browser, start: Callable[[dict[str, Any]], ServerProcess]
) -> None:
    server = start(
        {"worker": {"backend": "playback"}, "limits": {"api_keys": [{"name": "a", "key": "sesame"}]}}
    )
    page = browser.open(f"{server.url}/")
    page.wait("document.querySelector('#key-dialog').open")
    page.fill("#key", "falscher Schlüssel, 鍵")
    page.press("Enter")
    page.wait("document.querySelector('#key-problem').checkVisibility()")
    assert page.text("#key-problem") == "the API key is wrong"
    page.run("document.querySelector('#key').value = ''")
    page.fill("#key", "sesame")
    page.press("Enter")
    page.wait("!document.querySelector('#key-dialog').open")
    ask(page, played("let in"))
    page.wait(DONE)
    assert page.text(f"{ANSWER} .text") == "let in"
    assert page.run("[localStorage.length, document.cookie, sessionStorage['mlxd.key']]") == [
        0,
        "",
        "sesame",
    ]
    page.call("Page.reload")
    page.wait("document.querySelector('#state')?.textContent === 'running'")
    assert not page.run("document.querySelector('#key-dialog').open")


@pytest.fixture(scope="module")
def thinker() -> Iterator[ServerProcess]:
    worker = {"backend": "playback", "playback_tokens_per_second": 2000.0}
    with ServerProcess({"worker": worker, "chat": {"reasoning_parser": "qwen3"}}) as server:
        yield server


def test_what_a_model_writes_is_never_html(browser: Browser, thinker: ServerProcess) -> None:
    page = browser.open(f"{thinker.url}/")
    ask(page, played(f"<think>first <b>think</b></think>{HOSTILE}"))
    page.wait(DONE)
    text = page.text(f"{ANSWER} .text")
    assert '<img src=x onerror="window.hacked=1">' in text and "<script>window.hacked=1</script>" in text
    inside = f"document.querySelector('{ANSWER} .text')"
    tags = page.run(f"[...{inside}.querySelectorAll('*')].map((e) => e.tagName.toLowerCase())")
    assert {"h3", "strong", "code", "ul", "li", "table", "th", "td", "pre", "a"} <= set(tags)
    assert not {"img", "script", "b", "i", "iframe"} & set(tags)
    links = page.run(f"[...{inside}.querySelectorAll('a')].map((a) => a.getAttribute('href'))")
    assert links == ["https://example.org/a_(b)", "https://example.org/x.png"]
    assert page.run("window.hacked === undefined")
    assert not page.run(f"document.querySelector('{ANSWER} .reasoning').open")
    assert (
        page.run(f"document.querySelector('{ANSWER} .reasoning .plain').textContent") == "first <b>think</b>"
    )
    assert page.problems == []


def test_tool_calls_are_shown_and_their_results_sent_back(browser: Browser, thinker: ServerProcess) -> None:
    page = browser.open(f"{thinker.url}/")
    page.run(f"document.querySelector('#tools').value = {json.dumps(json.dumps([TOOL]))}")
    ask(page, played('So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'))
    page.wait(DONE)
    assert page.text(".call code") == "add"
    assert json.loads(page.text(".call pre")) == {"a": 1}
    page.fill(".call textarea", played("It is 2."))
    page.click(f"{ANSWER} > button")
    page.wait(f"{DONE} && document.querySelectorAll('.turn').length === 3")
    assert page.text(f"{ANSWER} .text") == "It is 2."


def test_errors_are_the_servers_words(browser: Browser, thinker: ServerProcess) -> None:
    page = browser.open(f"{thinker.url}/")
    page.run("document.querySelector('#temperature').value = '-1'")
    ask(page, "Hello")
    page.wait(DONE)
    assert "temperature" in page.text(f"{ANSWER} [role=alert]")
    page.run("document.querySelector('#temperature').value = ''")
    page.click(f"{ANSWER} .regenerate")
    page.wait(f"{DONE} && document.querySelector('{ANSWER} .text').innerText.includes('playback')")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_the_status_is_live(browser: Browser, slow_playback: ServerProcess, width: int, dark: bool) -> None:
    page = browser.open(f"{slow_playback.url}/", width=width, dark=dark)
    ask(page, played("word " * 2000))
    page.wait(f"document.querySelector('{ANSWER} .text').innerText.length")
    page.run("location.hash = '#status'")
    page.wait("document.querySelector('#requests tbody tr')")
    assert page.run("document.querySelector('#load dd').textContent") == "1"
    assert "generation" in page.text("#requests tbody") and "blocks" in page.text("#load")
    assert "cpu (playback)" in page.text("#server")
    assert page.run("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    page.click("#requests tbody button")
    page.wait("!document.querySelector('#requests tbody tr')")
    assert page.text("#no-requests") == "Nothing is running or waiting."
    slow_playback.wait_idle()


def test_a_hidden_page_asks_for_nothing(browser: Browser, thinker: ServerProcess) -> None:
    page = browser.open(f"{thinker.url}/#status")
    page.wait("document.querySelector('#load dd')?.textContent === '0'")
    page.run(
        "window.asked = 0; window.fetch = ((real) => (...what) => (asked++, real(...what)))(fetch);"
        "window.isHidden = true; Object.defineProperty(document, 'hidden', { get: () => isHidden });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert page.run("new Promise((done) => setTimeout(() => done(asked), 1500))") == 0
    page.run("window.isHidden = false; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait("asked >= 2")
