"""Names, aliases and ids of the parsers, and which one a model gets."""

from __future__ import annotations

import importlib
import random
import re
from pathlib import Path

import pytest

from mlxd.chat.tool_parsers import call_ids, detect, get, make_parser, names, registry
from mlxd.errors import ConfigError

TEMPLATES = Path(__file__).parents[1] / "templates"

ALIASES = {
    "mistral": (),
    "qwen": ("qwen3",),
    "qwen3_coder": ("qwen3_xml",),
    "llama": ("llama3", "llama4"),
    "hermes": ("nous",),
    "deepseek": ("deepseek_v3", "deepseek_r1"),
    "kimi": ("kimi_k2", "moonshot"),
    "granite": ("granite3",),
    "nemotron": (),
    "xlam": (),
    "functionary": ("meetkai",),
    "glm47": ("glm4",),
    "gemma4": (),
    "harmony": ("gpt_oss",),
    "minimax": (),
    "deepseek_v4": (),
    "longcat": (),
    "minicpm5": (),
    "muse": ("muse_spark", "muse_glimmer"),
    "kimi_k3": (),
    "auto": (),
}


@pytest.mark.parametrize("name", ALIASES)
def test_every_parser_of_the_api_is_there_under_all_its_names(name: str) -> None:
    for alias in (name, *ALIASES[name]):
        assert alias in names()
        assert get(alias) is get(name)
        parser = make_parser(alias, None, make_id=str)
        assert parser.name == name
        assert alias == name or alias in parser.aliases


def test_a_wrong_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'herms'; did you mean hermes"):
        get("herms")
    with pytest.raises(ConfigError, match=r"'\?\?' \(one of auto, deepseek,"):
        get("??")


@pytest.mark.parametrize("name", names())
def test_markers_begin_calls_and_no_marker_is_hidden_behind_another(name: str) -> None:
    parser = make_parser(name, None, make_id=str)
    assert parser.markers
    assert all(parser.markers)
    assert isinstance(parser.preserve_special_tokens, bool)
    for marker in parser.markers:
        assert parser.feed(marker) == [], "a marker is held back until it is known to begin no call"
        assert make_parser(name, None, make_id=str).feed("a" + marker)[0].text == "a"  # type: ignore[union-attr]
        parser = make_parser(name, None, make_id=str)


def test_markers_that_are_special_tokens_are_said_to_be() -> None:
    special = {name for name in ALIASES if get(name).preserve_special_tokens}
    assert special == set(ALIASES) - {"qwen", "qwen3_coder", "hermes", "nemotron", "glm47", "minicpm5"}


def test_ids() -> None:
    make_id = call_ids(random.Random(1))
    ids = {make_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("call_[A-Za-z0-9]{24}", call_id) for call_id in ids)
    assert call_ids(random.Random(1))() in ids


@pytest.mark.parametrize(
    ("file", "model_type", "expected"),
    [
        ("llama3_1.jinja", "llama", "llama"),
        ("mistral.jinja", "mistral", "mistral"),
        ("qwen2_5.jinja", "qwen2", "qwen"),
        ("qwen2_5.jinja", "llama", "hermes"),
        ("qwen2_5.jinja", None, "hermes"),
        ("qwen3.jinja", "qwen3", "qwen"),
        ("deepseek_r1.jinja", "qwen2", "deepseek"),
        ("smollm2.jinja", "llama", None),
        ("zephyr.jinja", "mistral", None),
        ("chatml.jinja", "qwen2", None),
    ],
)
def test_templates_decide(file: str, model_type: str | None, expected: str | None) -> None:
    assert detect((TEMPLATES / file).read_text(), model_type) == expected


@pytest.mark.parametrize(
    ("text", "model_type", "expected"),
    [
        ("<|start|>assistant<|channel|>", None, "harmony"),
        ("<｜DSML｜tool_calls> and <｜tool▁calls▁begin｜>", "deepseek_v32", "deepseek_v4"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v3", "deepseek"),
        ("<|tool_calls_section_begin|>", "deepseek_v3", "kimi"),
        ("<minimax:tool_call>", None, "minimax"),
        ("<|tool_call>call:", "gemma4", "gemma4"),
        ("<start_function_call>call:", "gemma3_text", "gemma4"),
        ("<tool_call>{name}\n<arg_key>", None, "glm47"),
        ("<TOOLCALL>[", "nemotron_h", "nemotron"),
        ("<tool_call>\n<function=\n<parameter=", "nemotron_h", "qwen3_coder"),
        ("<tool_call>\n<function=\n<parameter=", "qwen3_moe", "qwen3_coder"),
        ("make calls in a single JSON array", "llama", "xlam"),
        ("[TOOL_CALLS]", "llama", "mistral"),
        (">>>all\n", "llama", "functionary"),
        ("<|from|>assistant\n<|recipient|>", "mistral", "functionary"),
        ("<|start_of_role|> <tool_call>", "granitemoehybrid", "granite"),
        ("<|tool_call|>", "phi3", "granite"),
        ("<|python_tag|>", None, "llama"),
        ("<|tool_call_start|>", "lfm2", "llama"),
        ("<tool_call>", "glm4_moe", "glm47"),
        ("<tool_call>", "mistral", "hermes"),
        ("{% if tools %}", "gpt_oss", "harmony"),
        ("{% if tools %}", "llama", None),
        ("no word of them", "mistral", None),
        ("<longcat_tool_call> <longcat_arg_key>", "longcat_flash", "longcat"),
        ('<function name=\\"f\\"><param name=\\"k\\">', "llama", "minicpm5"),
        ("<atem:function_calls>", None, "muse"),
        ("<|open|>message role=", None, "kimi_k3"),
        (None, "kimi_k3", "kimi_k3"),
        (None, "mistral3", "mistral"),
        (None, "kimi_k2", "kimi"),
        (None, "llama", None),
        (None, None, None),
        ("", "mistral", None),
    ],
)
def test_hints_and_types(text: str | None, model_type: str | None, expected: str | None) -> None:
    assert detect(text, model_type) == expected


@pytest.mark.parametrize("name", ALIASES)
def test_every_parser_has_a_table_of_size(name: str) -> None:
    tables = importlib.import_module(f"tests.unit.chat.tool_parsers.test_{name}")
    assert len({case.text for case in tables.CASES}) >= 15


def test_every_parser_is_listed_here() -> None:
    assert set(ALIASES) == {get(name).name for name in names()}
    given = [name for cls in registry._FORMATS for name in (cls.name, *cls.aliases)]
    assert sorted(given) == list(names()), "two parsers have a name"
