"""Reading of YAML files, and the files of configs/."""

from __future__ import annotations

import configparser
import plistlib
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlxd import cli
from mlxd.cli.settings import KEY_TYPES, load
from mlxd.cli.yaml_file import MAX_FILE_BYTES, read_yaml
from mlxd.config import Config
from mlxd.errors import ConfigError
from tests.unit.api.test_metrics import KINDS

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_data_and_lines(tmp_path: Path) -> None:
    document = read_yaml(write(tmp_path, "a:\n  b: 1\n  c:\n  - x\n  - d: 2\n"))
    assert document.data == {"a": {"b": 1, "c": ["x", {"d": 2}]}}
    assert document.lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c[0]": 4, "a.c[1]": 5, "a.c[1].d": 5}
    assert document.origin("a.c[1].d") == f"{tmp_path / 'x.yaml'}:5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", r":3: a is given twice \(first on line 1\)"),
        ("a:\n  b: 1\n  b: 2\n", r":3: a\.b is given twice"),
        ("a: &x [1]\nb: *x\n", r":2: aliases"),
        ("a: !!python/object/apply:os.getcwd []\n", r":1: could not determine a constructor"),
        ("a: [1\nb: 2\n", r":2: "),
        ("- 1\n", r":1: the file must hold sections .* not a list"),
        ("just words", r"not a str"),
        ("a: 1\n---\nb: 2\n", r":2: "),
        ("? [1]\n: 2\n", r":1: a key must be a word"),
        ("a: 2025-13-45\n", r"month must be"),
        ("\ta: 1\n", r":1: "),
        (b"a: \xff\n", r":1: not UTF-8"),
        (b"a: \x00\n", r"special characters"),
        (b"#" * (MAX_FILE_BYTES + 1), r"larger than"),
        ("[" * 5000, r"recursion|flow"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        read_yaml(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


@given(
    raw=st.binary(max_size=60) | st.text(alphabet="ab:{}[]-&*!?|>'\"%@ \n\t#,1.", max_size=60).map(str.encode)
)
def test_any_bytes_give_a_document_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), raw)
    try:
        assert isinstance(read_yaml(path).data, dict)
    except ConfigError as error:
        assert str(error).startswith(str(path))


def test_server_yaml_is_the_defaults_and_names_every_key() -> None:
    path = CONFIGS / "server.yaml"
    assert load(path, {}, {}) == Config()
    assert {key for key in read_yaml(path).lines if "." in key} == set(KEY_TYPES)


def test_server_yaml_explains_every_group_of_keys() -> None:
    """A key stands under a comment, or right under a key that shares one."""
    lines = (CONFIGS / "server.yaml").read_text().splitlines()
    previous = ""
    for line in lines:
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            assert previous.startswith("  "), f"{line!r} has no comment"
        previous = line


def test_demo_yaml_is_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    parser = cli._command_parser("demo")
    assert load(CONFIGS / "demo.yaml", {}, {}) == cli._config("demo", parser.parse_args([]))


def test_production_yaml_is_the_guides_example_for_many_users() -> None:
    config = load(CONFIGS / "production.yaml", {}, {})
    assert config.model.path == "mlx-community/Qwen3-0.6B-8bit"
    assert config.scheduler.continuous_batching and config.cache.paged
    assert (config.limits.timeout_seconds, config.server.port) == (120.0, 8000)
    assert len(config.limits.api_keys) == 1
    assert config.server.shutdown_seconds >= config.limits.timeout_seconds


def test_systemd_unit() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(CONFIGS / "mlxd.service")
    service = unit["Service"]
    assert service["ExecStart"] == "/opt/mlxd/bin/mlxd -c /etc/mlxd/production.yaml"
    assert service["RestartPreventExitStatus"] == str(cli.EXIT_USAGE)
    production = load(CONFIGS / "production.yaml", {}, {})
    assert float(service["TimeoutStopSec"]) > production.server.shutdown_seconds
    assert unit["Install"]["WantedBy"] == "multi-user.target"


def test_launchd_plist() -> None:
    with (CONFIGS / "io.mlxd.plist").open("rb") as file:
        job = plistlib.load(file)
    assert job["Label"] == "io.mlxd"
    assert job["ProgramArguments"][1:] == ["-c", "/usr/local/etc/mlxd/production.yaml"]
    production = load(CONFIGS / "production.yaml", {}, {})
    assert job["ExitTimeOut"] > production.server.shutdown_seconds


def test_nginx_fits_production_yaml() -> None:
    """What it lets through is for mlxd to refuse, in words; what it does not, are the metrics."""
    text = (CONFIGS / "nginx.conf").read_text()
    assert text.count("{") == text.count("}")
    directives = dict(re.findall(r"^\s*(\w+) (.+);$", text, re.MULTILINE))
    production = load(CONFIGS / "production.yaml", {}, {})
    assert directives["server"] == f"{production.server.host}:{production.server.port}"
    megabytes = int(directives["client_max_body_size"].removesuffix("m"))
    assert megabytes * 2**20 > production.server.max_body_bytes
    assert float(directives["proxy_read_timeout"].removesuffix("s")) > production.limits.timeout_seconds
    assert directives["proxy_buffering"] == "off" and production.server.trusted_proxies == ("127.0.0.1",)
    assert re.search(r"location = /metrics \{\s*return 404;", text) and production.server.metrics


def test_prometheus_scrapes_production_yaml_and_its_rules_name_real_metrics() -> None:
    scrape = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    production = load(CONFIGS / "production.yaml", {}, {})
    [job] = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{production.server.port}"]}]
    rules = yaml.safe_load((CONFIGS / scrape["rule_files"][0]).read_text())["groups"][0]["rules"]
    names = {name for rule in rules for name in re.findall(r"mlxd_\w+", rule["expr"])}
    assert {name.removesuffix("_bucket") for name in names} <= set(KINDS)


def test_comments_of_server_yaml_name_the_allowed_words() -> None:
    text = (CONFIGS / "server.yaml").read_text()
    for words in ("auto, float32, float16 or bfloat16", "debug, info, warning or error"):
        assert re.search(words, text)
