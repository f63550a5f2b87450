"""Merging and checking of configuration sources."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.cli import settings
from mlxd.cli.settings import KEY_TYPES, MASK, Reading, load, masked, resolve_secrets
from mlxd.config import ApiKeyConfig, Config
from mlxd.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def flag(value: object, name: str = "--flag") -> Reading:
    return Reading(value, name, is_text=not isinstance(value, bool))


def problem(**sources: object) -> str:
    arguments: dict[str, object] = {"path": None, "environ": {}, "flags": {}} | sources
    with pytest.raises(ConfigError) as caught:
        load(**arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_nothing_given_is_the_defaults() -> None:
    assert load(None, {}, {}) == Config()


def test_each_source_wins_over_the_one_before(tmp_path: Path) -> None:
    path = write(tmp_path, "server: {port: 2, host: yaml, backlog: 7}\nlog: {level: error}\n")
    base = {key: Reading("base", "base") for key in ("server.host", "model.owned_by", "model.revision")}
    environ = {"MLXD_SERVER_PORT": "3", "MLXD_SERVER_HOST": "env", "MLXD_MODEL_REVISION": "env"}
    config = load(path, environ, {"server.port": flag("4")}, base)
    assert (config.server.port, config.server.host) == (4, "env")
    assert (config.model.owned_by, config.model.revision) == ("base", "env")
    assert (config.server.backlog, config.log.level) == (7, "error")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("server.port", "0", 0),
        ("server.port", " 8001 ", 8001),
        ("server.access_log", "no", False),
        ("model.trust_remote_code", "TRUE", True),
        ("scheduler.continuous_batching", "off", False),
        ("cache.memory_percent", "0.5", 0.5),
        ("cache.memory_percent", "1", 1.0),
        ("cache.memory_mb", "null", None),
        ("model.path", "null", "null"),
        ("model.path", "12", "12"),
        ("model.dtype", "float16", "float16"),
        ("model.served_names", "a, b,", ("a", "b")),
        ("server.cors_origins", "*", ("*",)),
        ("limits.timeout_seconds", "1e3", 1000.0),
        (
            "limits.api_keys",
            "k1,k2",
            (ApiKeyConfig(name="default", key="k1"), ApiKeyConfig(name="key-2", key="k2")),
        ),
    ],
)
def test_text_is_read_as_the_type_of_its_key(key: str, text: str, value: object) -> None:
    section, _, name = key.partition(".")
    variable = settings.ENV_PREFIX + key.replace(".", "_").upper()
    for config in (load(None, {variable: text}, {}), load(None, {}, {key: flag(text)})):
        assert getattr(getattr(config, section), name) == value


def test_a_comma_in_a_repeated_flag_is_part_of_the_value() -> None:
    config = load(None, {}, {"model.served_names": flag(["a,b", "c"])})
    assert config.model.served_names == ("a,b", "c")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("server.port", "70000", "'70000' is not allowed; expected an integer from 0 to 65535"),
        ("server.port", "8.5", "expected an integer"),
        ("server.metrics", "maybe", "expected true or false"),
        ("cache.memory_percent", "0", "expected a number above 0 and of at most 1"),
        ("limits.timeout_seconds", "inf", "expected a number above 0"),
        ("limits.timeout_seconds", "nan", "expected a number above 0"),
        ("scheduler.max_num_seqs", "0", "expected an integer of at least 1"),
        ("model.dtype", "int8", "expected one of auto, bfloat16, float16, float32"),
        ("cache.memory_mb", "much", "expected an integer of at least 1 or null"),
    ],
)
def test_a_wrong_value_says_what_was_read_and_what_is_allowed(key: str, text: str, expected: str) -> None:
    message = problem(flags={key: flag(text, "--it")})
    assert message.startswith(f"--it: {key}: ")
    assert expected in message


def test_yaml_problems_have_file_and_line_and_all_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "server:\n  port: eighty\n  prot: 1\nsever:\n  host: x\nlog: loud\n")
    lines = problem(path=path).splitlines()
    assert len(lines) == 4
    assert any(line.startswith(f"{path}:2: server.port: 'eighty' is not allowed") for line in lines)
    assert any(
        line.startswith(f"{path}:3: server.prot: no such key; did you mean server.port?") for line in lines
    )
    assert any(line.startswith(f"{path}:4: sever: no such section; did you mean server?") for line in lines)
    assert any(line.startswith(f"{path}:6: log: 'loud' is not a section") for line in lines)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("port", "did you mean server.port?"),
        ("server.max_num_seqs", "did you mean scheduler.max_num_seqs?"),
        ("cache.memory_mib", "did you mean cache.memory_mb?"),
        ("zzz.qqq", "there are model, server"),
        ("log.zzz", "log holds level, format"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, hint: str) -> None:
    assert hint in problem(flags={key: flag("1", "--set")})


def test_yaml_types_are_not_stretched(tmp_path: Path) -> None:
    for text, word in (
        ("server: {port: '80'}", "'80'"),
        ("server: {metrics: 1}", "1"),
        ("server: {port: yes}", "true"),
    ):
        assert f"{word} is not allowed" in problem(path=write(tmp_path, text))
    assert "is not a list" in problem(path=write(tmp_path, "model: {served_names: abc}"))
    assert "null is not allowed" in problem(path=write(tmp_path, "server: {port: null}"))
    assert load(write(tmp_path, "limits: {timeout_seconds: 5}"), {}, {}).limits.timeout_seconds == 5.0


def test_empty_files_and_sections_are_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), {}, {}) == Config()
    assert load(write(tmp_path, "# nothing\nserver:\n"), {}, {}) == Config()


def test_environment_variables_that_are_not_keys() -> None:
    foreign = {"MLXD_DEBUG": "1", "MLXD_CACHE": "/x", "MLXD_PORT": "tcp://10.0.0.1:80", "PATH": "/bin"}
    assert load(None, foreign | {"MLXD_SERVER_PORT": ""}, {}) == Config()
    message = problem(environ={"MLXD_SERVER_PROT": "1"})
    assert message == "MLXD_SERVER_PROT: no such variable; did you mean MLXD_SERVER_PORT?"
    twice = problem(environ={"MLXD_API_KEY": "a", "MLXD_LIMITS_API_KEYS": "b"})
    assert "both set" in twice


def test_environment_names_are_unambiguous() -> None:
    names = [settings.ENV_PREFIX + key.replace(".", "_").upper() for key in KEY_TYPES]
    assert len(set(names)) == len(names)


def test_the_two_models_have_names_of_their_own() -> None:
    assert "must differ" in problem(flags={"embeddings.served_names": flag("a,a")})
    shared = {"embeddings.model": flag("b"), "embeddings.served_names": flag("a"), "model.path": flag("x/y")}
    assert load(None, {}, shared).embeddings.served_names == ("a",)
    message = problem(flags={**shared, "model.served_names": flag("a")})
    assert "embeddings.model: a is the name of the chat model already" in message


@pytest.mark.parametrize("key", ["chat.reasoning_parser", "chat.tool_call_parser"])
def test_parsers_are_known_by_name(key: str) -> None:
    for name in ("auto", "none", "qwen3"):
        assert getattr(load(None, {}, {key: flag(name)}).chat, key.partition(".")[2]) == name
    message = problem(flags={key: flag("quen3")})
    assert f"{key}: 'quen3' is not allowed; did you mean qwen3? (one of " in message


def test_calls_cannot_be_insisted_on_and_left_unread() -> None:
    insist = {"chat.enable_auto_tool_choice": flag("true")}
    assert load(None, {}, insist).chat.enable_auto_tool_choice
    assert "tool_call_parser is none" in problem(flags={**insist, "chat.tool_call_parser": flag("none")})


@pytest.mark.parametrize("entries", ["10.0.0.0/8", "10.0.0.1,unix,::1", "2001:db8::/32"])
def test_trusted_proxies(entries: str) -> None:
    proxies = load(None, {"MLXD_SERVER_TRUSTED_PROXIES": entries}, {}).server.trusted_proxies
    assert proxies == tuple(entries.split(","))


def test_a_trusted_proxy_that_is_none_is_named(tmp_path: Path) -> None:
    message = problem(path=write(tmp_path, "server:\n  trusted_proxies: [10.0.0.0/8, nginx]\n"))
    assert message.endswith(":2: server.trusted_proxies: 'nginx' is no address, network or 'unix'")


class TestApiKeys:
    def yaml(self, folder: Path, entries: str) -> Path:
        return write(folder, f"limits:\n  api_keys:\n{entries}")

    def test_from_value_file_and_variable(self, tmp_path: Path) -> None:
        file = tmp_path / "key"
        file.write_text("from-file\n", encoding="utf-8")
        path = self.yaml(
            tmp_path,
            "  - {name: a, key: plain}\n"
            f"  - {{name: b, key_file: {file}}}\n"
            "  - {name: c, key_env: THE_KEY}\n",
        )
        config = load(path, {}, {})
        resolved = resolve_secrets(config, {"THE_KEY": "from-env"})
        assert [(k.name, k.key) for k in resolved.limits.api_keys] == [
            ("a", "plain"),
            ("b", "from-file"),
            ("c", "from-env"),
        ]
        assert all(k.key_file is None and k.key_env is None for k in resolved.limits.api_keys)

    def test_what_a_key_may_do(self, tmp_path: Path) -> None:
        limits = "rate_limit: 60, token_rate_limit: 0, token_quota: 1000000, priority: -2, weight: 2"
        config = load(self.yaml(tmp_path, f"  - {{name: a, key: k, {limits}}}\n  - {{key: l}}\n"), {}, {})
        assert resolve_secrets(config, {}).limits.api_keys == (
            ApiKeyConfig(
                name="a",
                key="k",
                rate_limit=60,
                token_rate_limit=0,
                token_quota=1_000_000,
                priority=-2,
                weight=2.0,
            ),
            ApiKeyConfig(key="l"),
        )

    @pytest.mark.parametrize(
        ("entries", "expected"),
        [
            (
                "  - {key: a, weight: 0}\n",
                ":3: limits.api_keys[0].weight: 0 is not allowed; expected a number",
            ),
            ("  - {key: a, token_quota: 0}\n", ":3: limits.api_keys[0].token_quota: 0 is not allowed"),
            ("  - {name: a}\n", "entry 0 needs exactly one of key, key_file and key_env"),
            ("  - {key: a, key_env: B}\n", "exactly one"),
            ("  - {key: a}\n  - {key: b}\n", "names must differ"),
            ("  - {name: a, kye: x}\n", ":3: limits.api_keys[0].kye: no such key; did you mean key?"),
            ("  - {name: 7, key: x}\n", ":3: limits.api_keys[0].name: 7 is not allowed; expected text"),
            ("  - 7\n", ":3: limits.api_keys[0]: expected the keys name, key, key_file, key_env"),
        ],
    )
    def test_wrong_entries(self, tmp_path: Path, entries: str, expected: str) -> None:
        assert expected in problem(path=self.yaml(tmp_path, entries))

    def test_a_key_is_never_shown(self, tmp_path: Path) -> None:
        secret = "987654321012345"
        assert secret not in problem(path=self.yaml(tmp_path, f"  - {{key: {secret}}}\n"))
        assert secret not in problem(path=write(tmp_path, f"limits: {{api_keys: {secret}}}\n"))
        config = load(None, {}, {"limits.api_keys": flag(["sk-" + secret])})
        assert secret not in str(masked(config))
        assert MASK in str(masked(config))
        with pytest.raises(ConfigError) as caught:
            resolve_secrets(load(None, {}, {"limits.api_keys": flag([secret + " x"])}), {})
        assert secret not in str(caught.value)

    def test_keys_that_cannot_be_had(self, tmp_path: Path) -> None:
        big = tmp_path / "big"
        big.write_bytes(b"k" * 5000)
        empty = tmp_path / "empty"
        empty.write_bytes(b"\n")
        for entry, expected in (
            (f"key_file: {tmp_path / 'none'}", "cannot be read"),
            (f"key_file: {big}", "larger than"),
            (f"key_file: {empty}", "not empty"),
            ("key_env: MISSING", "the environment has no MISSING"),
            ("key: 'ключ'", "printable ASCII"),
        ):
            config = load(self.yaml(tmp_path, f"  - {{{entry}}}\n"), {}, {})
            with pytest.raises(ConfigError, match=expected):
                resolve_secrets(config, {})

    def test_two_names_for_one_key_are_refused(self) -> None:
        config = load(None, {}, {"limits.api_keys": flag(["same", "same"])})
        with pytest.raises(ConfigError, match="the same key"):
            resolve_secrets(config, {})


def test_masked_is_the_whole_configuration_and_reads_back() -> None:
    config = load(None, {}, {"model.served_names": flag(["a", "b"])})
    assert msgspec.convert(masked(config), Config) == config


@given(
    st.dictionaries(
        st.sampled_from(sorted(KEY_TYPES)) | st.text(max_size=12),
        st.text(max_size=12) | st.sampled_from(["1", "0.5", "null", "true", "-1", "1e400"]),
        max_size=5,
    )
)
def test_any_assignment_gives_a_configuration_or_a_config_error(assignments: dict[str, str]) -> None:
    try:
        config = load(
            None, {}, {key: Reading(text, "--set", is_text=True) for key, text in assignments.items()}
        )
    except ConfigError as error:
        assert str(error)
    else:
        assert msgspec.convert(msgspec.to_builtins(config), Config) == config
