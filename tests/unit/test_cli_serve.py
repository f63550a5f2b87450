"""What `mlxd serve` wires together and says."""

from __future__ import annotations

import io
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import msgspec
import pytest

from mlxd.cli import serve
from mlxd.cli.progress import LogProgress, TerminalProgress, amount, progress_view
from mlxd.config import ApiKeyConfig, Config, EmbeddingsConfig, LimitsConfig, ModelConfig, ServerConfig
from mlxd.errors import ConfigError, MlxdError, WorkerError
from mlxd.step import EmbedderReady, MemoryPlan, Progress, WorkerReady

MEMORY = MemoryPlan(8_000_000_000, 540_000_000, 60_000_000, 1_200_000_000, 46_080)


def ready(**changes: object) -> WorkerReady:
    info = WorkerReady(
        pid=7,
        model_type="llama",
        vocab_size=10,
        max_model_len=8192,
        num_blocks=4,
        block_size=16,
        memory=MEMORY,
        device="cpu (x)",
        attention="gather",
        dtype="float32",
    )
    return msgspec.structs.replace(info, **changes)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FakeView:
    def __init__(self) -> None:
        self.updates: list[Progress] = []
        self.is_closed = False

    def update(self, progress: Progress) -> None:
        self.updates.append(progress)

    def close(self) -> None:
        self.is_closed = True


class TestAnnouncer:
    def make(self, config: Config, *, show_example: bool = False) -> tuple[serve.Announcer, io.StringIO]:
        self.view, self.stops, out = FakeView(), [], io.StringIO()
        announcer = serve.Announcer(
            config, self.view, out, show_example=show_example, stop=lambda: self.stops.append(1)
        )
        return announcer, out

    view: FakeView
    stops: list[int]

    def test_says_model_address_and_memory_once(self) -> None:
        announcer, out = self.make(Config(model=ModelConfig(path="org/m")))
        announcer.listening("http://127.0.0.1:4242")
        assert out.getvalue() == ""
        announcer.ready(ready())
        assert out.getvalue().splitlines() == [
            "mlxd is ready: org/m at http://127.0.0.1:4242",
            "  cpu (x), float32, gather attention, 8,192 tokens",
            "  memory: 0.54 GB weights + 1.20 GB KV pool (26,041 tokens) + 0.06 GB activations "
            "= 1.80 of 8.00 GB",
        ]
        assert self.view.is_closed
        announcer.ready(ready(pid=8))
        assert len(out.getvalue().splitlines()) == 3

    def test_says_what_states_take(self) -> None:
        line = serve.memory_line(msgspec.structs.replace(MEMORY, state_bytes=250_000_000))
        assert "(26,041 tokens) + 0.25 GB states + 0.06 GB activations = 2.05 of 8.00 GB" in line

    def test_the_order_does_not_matter(self) -> None:
        announcer, out = self.make(Config(model=ModelConfig(path="m")))
        announcer.ready(ready())
        announcer.listening("http://h:1")
        assert out.getvalue().startswith("mlxd is ready: m at http://h:1\n")

    def test_an_embedding_model_is_waited_for(self, caplog: pytest.LogCaptureFixture) -> None:
        embeddings = EmbeddingsConfig(model="org/e", served_names=("small",))
        announcer, out = self.make(Config(model=ModelConfig(path="m"), embeddings=embeddings))
        embedder = EmbedderReady(8, "bert", 10, 1024, 384, False, "cpu", "float32", warnings=("it is slow",))
        announcer.listening("http://h:1")
        announcer.ready(ready())
        assert out.getvalue() == ""
        announcer.embedder_ready(embedder)
        last = out.getvalue().splitlines()[-1]
        assert last == "  embeddings: small, 384 dimensions, float32, inputs of 1,024 tokens"
        assert "it is slow" in caplog.text
        announcer.embedder_ready(embedder)
        assert out.getvalue().splitlines()[-1] == last
        scores = msgspec.structs.replace(embedder, is_cross_encoder=True, size=1)
        nameless = Config(embeddings=EmbeddingsConfig(model="org/e"))
        assert serve.embedding_line(nameless, scores).startswith("org/e, cross-encoder, float32")

    def test_warnings_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        announcer, _ = self.make(Config())
        announcer.ready(ready())
        announcer.ready(ready(warnings=("the kernel is off",)))  # a new worker's
        assert caplog.messages[0] == "the kernel is off"

    @pytest.mark.parametrize(("error", "code"), [(ConfigError("no such model"), 2), (WorkerError("gone"), 1)])
    def test_a_failure_stops_the_server(
        self, error: MlxdError, code: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        announcer, out = self.make(Config())
        announcer.failed(error)
        assert announcer.exit_code == code and self.view.is_closed and self.stops == [1]
        announcer.embedder_failed(error)
        assert announcer.exit_code == code
        assert caplog.messages == [f"stopping: {error}", f"stopping: the embedding model: {error}"]
        assert out.getvalue() == ""

    def test_of_two_failures_the_operators_counts(self) -> None:
        """Another start would not help, whichever comes last."""
        mistake, accident = ConfigError("no such model"), WorkerError("gone")
        for first, second in ((mistake, accident), (accident, mistake)):
            announcer, _ = self.make(Config())
            announcer.failed(first)
            announcer.embedder_failed(second)
            assert announcer.exit_code == 2

    def test_the_demo_prints_a_command_to_paste(self) -> None:
        announcer, out = self.make(Config(), show_example=True)
        announcer.listening("http://127.0.0.1:8000")
        announcer.ready(ready())
        words = shlex.split(out.getvalue().splitlines()[-1])
        assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
        body = json.loads(words[words.index("-d") + 1])
        assert body["messages"][0]["content"] == serve.EXAMPLE_QUESTION


@pytest.mark.parametrize(
    ("server", "url", "start"),
    [
        (ServerConfig(), "http://0.0.0.0:8000", ["curl", "http://127.0.0.1:8000/v1/chat/completions"]),
        (ServerConfig(), "http://[::]:8000", ["curl", "http://[::1]:8000/v1/chat/completions"]),
        (
            ServerConfig(unix_socket="/run/my mlxd.sock"),
            "unix:/run/my mlxd.sock",
            ["curl", "--unix-socket", "/run/my mlxd.sock", "http://localhost/v1/chat/completions"],
        ),
    ],
)
def test_the_command_to_paste_reaches_the_server(server: ServerConfig, url: str, start: list[str]) -> None:
    assert shlex.split(serve.curl_line(Config(server=server), url))[: len(start)] == start


def test_the_command_to_paste_never_has_the_key() -> None:
    config = Config(limits=LimitsConfig(api_keys=(ApiKeyConfig(key="s3cret"),)))
    line = serve.curl_line(config, "http://127.0.0.1:1")
    assert "s3cret" not in line
    assert "$MLXD_API_KEY" in line


@pytest.mark.parametrize(
    ("host", "is_exposed"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("box", True),
    ],
)
def test_who_is_exposed(host: str, is_exposed: bool) -> None:
    server = ServerConfig(host=host)
    assert serve.is_exposed(Config(server=server)) is is_exposed
    keyed = LimitsConfig(api_keys=(ApiKeyConfig(key="k"),))
    assert not serve.is_exposed(Config(server=server, limits=keyed))
    assert not serve.is_exposed(Config(server=ServerConfig(host=host, unix_socket="/x")))


class TestRunServe:
    """run_serve with stand-ins for the three things that it joins."""

    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.seen = SimpleNamespace(server=lambda on_listening: 0)
        seen = self.seen

        class Engine:
            def __init__(self, config: Config, **callbacks: Callable[..., None]) -> None:
                seen.config, seen.callbacks = config, callbacks

        def fake_serve(app: object, config: ServerConfig, **options: object) -> int:
            seen.options = options
            code: int = seen.server(options["on_listening"])
            return code

        app = SimpleNamespace(end_streams=lambda: None, describe_error=lambda *told: None)
        for name, content in (
            ("mlxd.engine.engine", {"Engine": Engine}),
            ("mlxd.api.app", {"create_app": lambda config, engine, embeddings: app}),
            ("mlxd.server", {"serve": fake_serve}),
        ):
            module = ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(serve.log, "setup", lambda *arguments, **options: setattr(seen, "log", options))
        monkeypatch.setattr("signal.raise_signal", lambda number: setattr(seen, "signal", number))
        self.app = app
        yield

    def test_joins_the_parts(self) -> None:
        config = Config(server=ServerConfig(host="127.0.0.1"))
        assert serve.run_serve(config, show_example=False) == 0
        assert self.seen.config == config
        assert self.seen.options["on_shutdown_deadline"] is self.app.end_streams
        assert self.seen.options["describe_error"] is self.app.describe_error
        assert self.seen.options["access_log"] is logging.getLogger("mlxd.access")

    def test_without_an_access_log(self) -> None:
        assert serve.run_serve(Config(server=ServerConfig(access_log=False)), show_example=False) == 0
        assert self.seen.options["access_log"] is None

    def test_secrets_are_resolved_for_the_app_and_masked_in_logs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("THE_KEY", "s3cret")
        limits = LimitsConfig(api_keys=(ApiKeyConfig(key_env="THE_KEY"),))
        assert serve.run_serve(Config(limits=limits), show_example=False) == 0
        assert self.seen.config.limits.api_keys[0].key == "s3cret"
        assert self.seen.log == {"secrets": ["s3cret"]}
        monkeypatch.delenv("THE_KEY")
        with pytest.raises(ConfigError):
            serve.run_serve(Config(limits=limits), show_example=False)

    def test_an_open_address_without_a_key_is_warned_about(self, caplog: pytest.LogCaptureFixture) -> None:
        serve.run_serve(Config(), show_example=False)
        assert "0.0.0.0 is open to the network" in caplog.text
        caplog.clear()
        serve.run_serve(Config(server=ServerConfig(host="127.0.0.1")), show_example=False)
        assert caplog.text == ""

    def test_an_address_that_is_taken_is_a_failure(self, caplog: pytest.LogCaptureFixture) -> None:
        def taken(on_listening: object) -> int:
            raise OSError(98, "Address already in use")

        self.seen.server = taken
        config = Config(server=ServerConfig(host="127.0.0.1", port=80))
        assert serve.run_serve(config, show_example=False) == 1
        assert "cannot listen on 127.0.0.1:80: Address already in use" in caplog.text

    @pytest.mark.parametrize(("error", "code"), [(ConfigError("no such model"), 2), (WorkerError("gone"), 1)])
    def test_the_exit_code_says_whether_another_start_may_help(self, error: MlxdError, code: int) -> None:
        def fail(on_listening: Callable[[str], None]) -> int:
            on_listening("http://x:1")
            self.seen.callbacks["on_failed"](error)
            return 0

        self.seen.server = fail
        assert serve.run_serve(Config(), show_example=False) == code
        assert self.seen.signal == 15


class TestProgress:
    @pytest.mark.parametrize(
        ("progress", "words"),
        [
            (Progress("download", 12_000_000, 93_100_000, "bytes"), "12.0 of 93.1 MB"),
            (Progress("download", 12_000_000, 0, "bytes"), "12.0 MB"),
            (Progress("load", 3, 30, "layers"), "3 of 30 layers"),
            (Progress("load", 3, 0, "layers"), "3 layers"),
            (Progress("load", 0, 30, "layers"), "0 of 30 layers"),
            (Progress("warmup", 0, 0), ""),
        ],
    )
    def test_amounts(self, progress: Progress, words: str) -> None:
        assert amount(progress) == words

    def test_bars_on_a_terminal_lines_elsewhere(self) -> None:
        assert isinstance(progress_view(Terminal(), lambda: 0.0), TerminalProgress)
        assert isinstance(progress_view(io.StringIO(), lambda: 0.0), LogProgress)

    def test_a_line_a_stage_and_then_one_now_and_then(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", logger="mlxd")
        times: list[float] = []
        view = LogProgress(lambda: times[-1])
        for now, progress in (
            (0.0, Progress("resolve", 0, 0, "", "org/m")),
            (0.1, Progress("download", 0, 100_000_000, "bytes")),
            (4.9, Progress("download", 40_000_000, 100_000_000, "bytes")),
            (5.1, Progress("download", 50_000_000, 100_000_000, "bytes")),
            (5.2, Progress("download", 51_000_000, 100_000_000, "bytes")),
            (5.3, Progress("other", 1, 2)),
        ):
            times.append(now)
            view.update(progress)
        view.close()
        assert caplog.messages == [
            "finding the model org/m",
            "downloading 0.0 of 100.0 MB",
            "downloading 50.0 of 100.0 MB",
            "other 1 of 2",
        ]

    def test_bars(self) -> None:
        terminal = Terminal()
        view = TerminalProgress(terminal)
        view.update(Progress("download", 10_000_000, 20_000_000, "bytes"))
        view.update(Progress("warmup", 0, 0))
        view.close()
        view.close()
        text = terminal.getvalue()
        assert "✓ downloading" in text and "10.0 of 20.0 MB" in text
        assert "✓ warming up" in text

    def test_a_view_that_was_closed_opens_again_for_a_restart(self) -> None:
        terminal = Terminal()
        view = TerminalProgress(terminal)
        for _ in range(2):
            view.update(Progress("load", 1, 2, "layers"))
            view.close()
        assert terminal.getvalue().count("✓ loading") == 2
