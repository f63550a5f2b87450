"""The web page as HTTP: who gets it, what its headers promise, and that it needs nothing from elsewhere."""

from __future__ import annotations

import re

import pytest

from mlxd.api.web_page import FOLDER, MEDIA_TYPES, web_page
from tests.unit.api.fakes import FakeEngine, call, make_app

KEYS = {"limits": {"api_keys": [{"name": "a", "key": "sesame"}]}}
PATHS = sorted(web_page())


def test_every_file_is_served_and_none_else() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {path.removeprefix("/web/") for path in PATHS if path != "/"} == names - {"index.html"}
    assert call(make_app(FakeEngine()), "GET", "/web/../app.py").status_code == 404


@pytest.mark.parametrize("path", PATHS)
def test_it_loads_without_a_key_under_a_strict_policy(path: str) -> None:
    app = make_app(FakeEngine(), KEYS)
    response = call(app, "GET", path)
    assert response.status_code == 200
    suffix = "." + path.rpartition(".")[2] if path != "/" else ".html"
    assert response.headers["content-type"].encode() == MEDIA_TYPES[suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert call(app, "GET", "/v1/status").status_code == 401


@pytest.mark.parametrize("path", PATHS)
def test_head_and_conditions(path: str) -> None:
    app = make_app(FakeEngine())
    whole = call(app, "GET", path)
    head = call(app, "HEAD", path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))
    etag = whole.headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        same = call(app, "GET", path, headers={"if-none-match": known})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
        assert "content-length" not in same.headers
    assert call(app, "GET", path, headers={"if-none-match": '"x"'}).status_code == 200


def test_other_methods_are_refused() -> None:
    response = call(make_app(FakeEngine()), "POST", "/")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_it_can_be_turned_off() -> None:
    app = make_app(FakeEngine(), {"server": {"web_page": False}})
    assert {call(app, "GET", path).status_code for path in PATHS} == {404}


def test_it_needs_nothing_from_elsewhere_and_writes_no_html() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    asked = [name for text in texts.values() for name in re.findall(r'(?:from|src=|href=) ?"([^"#]+)"', text)]
    assert len(asked) > 10
    assert {name.removeprefix("./").removeprefix("web/") for name in asked} <= texts.keys()
    for name, text in texts.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|@import|url\(", text
        ), name
