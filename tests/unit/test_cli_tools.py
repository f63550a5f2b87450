"""Commands that start no server: check, doctor and bench."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import mlxd
from mlxd import cli
from mlxd.cli import check, doctor, settings, worker_tool
from mlxd.config import Config


class TestCheck:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
        code = cli.main(["check", *arguments])
        return code, capsys.readouterr().out

    def test_prints_the_configuration_masked_and_the_plan(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        asked: list[bytes] = []

        def run_tool(module: str, stdin: bytes) -> dict[str, object]:
            asked.append(stdin)
            plan = [8_000_000_000, 540_000_000, 60_000_000, 1_200_000_000, 46_080]
            return {"memory": plan, "warnings": ["9 sequences run at once"]}

        monkeypatch.setattr(check, "run_tool", run_tool)
        code, out = self.run(capsys, "some/model", "--api-key", "hunter2", "--port", "9")
        assert code == 0
        assert "hunter2" not in out and b"hunter2" not in asked[0]
        assert (
            "# memory: 0.54 GB weights + 1.20 GB KV pool (26,041 tokens) + 0.06 GB activations "
            "= 1.80 of 8.00 GB\n# 9 sequences run at once\n"
        ) in out
        path = tmp_path / "again.yaml"
        path.write_text(out)
        again = settings.load(path, {}, {})
        assert again.server.port == 9
        assert msgspec.json.decode(asked[0], type=Config).server.port == 9

    @pytest.mark.parametrize(
        ("answer", "code", "expected"),
        [
            ({"error": "not on disk", "fatal": False}, 0, "# memory plan: not on disk"),
            ({"error": "needs 9 GB of 8", "fatal": True}, 2, "# memory plan: needs 9 GB of 8"),
            (worker_tool.ToolError("it broke"), 0, "# memory plan: not known: it broke"),
        ],
    )
    def test_says_why_there_is_no_plan(
        self,
        answer: object,
        code: int,
        expected: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def run_tool(module: str, stdin: bytes) -> object:
            if isinstance(answer, Exception):
                raise answer
            return dict(answer)  # type: ignore[call-overload]

        monkeypatch.setattr(check, "run_tool", run_tool)
        got, out = self.run(capsys, "some/model")
        assert got == code
        assert expected in out

    @pytest.mark.parametrize(
        ("answer", "code", "expected"),
        [
            (
                {
                    "weights_bytes": 90_000_000,
                    "max_model_len": 8192,
                    "is_cross_encoder": True,
                    "dtype": "float32",
                },
                0,
                "# embeddings: some/e, cross-encoder, float32, inputs of 8,192 tokens, 0.09 GB weights\n",
            ),
            ({"error": "embeddings.model is nowhere", "fatal": True}, 2, "# embeddings: embeddings.model is"),
        ],
    )
    def test_looks_at_the_embedding_model_too(
        self,
        answer: dict[str, object],
        code: int,
        expected: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Also where there is no other that one could plan for."""
        modules: list[str] = []

        def run_tool(module: str, stdin: bytes) -> dict[str, object]:
            modules.append(module)
            return answer

        monkeypatch.setattr(check, "run_tool", run_tool)
        got, out = self.run(capsys, "--embedding-model", "some/e")
        assert got == code
        assert expected in out
        assert modules == [check.EMBEDDING_PLAN_MODULE]

    def test_needs_no_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out = self.run(capsys, "--host", "127.0.0.1")
        assert (code, "open to the network" in out) == (0, False)
        assert "no model is given" in out
        assert "open to the network" in self.run(capsys)[1]


class TestWorkerTool:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path / "a_tool.py"

    def test_reads_the_last_line(self, module: Path) -> None:
        module.write_text("import sys\nprint('hello')\nprint('{\"got\": ' + sys.stdin.read() + '}')\n")
        assert worker_tool.run_tool("a_tool", b"[1]") == {"got": [1]}

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("raise SystemExit('no such device')", "exit code 1: no such device"),
            ("", "exit code 0: it printed nothing"),
            ("print('[]')", "exit code 0"),
        ],
    )
    def test_a_tool_that_gives_no_object(self, module: Path, code: str, expected: str) -> None:
        module.write_text(code)
        with pytest.raises(worker_tool.ToolError, match=expected):
            worker_tool.run_tool("a_tool")

    def test_a_tool_that_hangs(self, module: Path) -> None:
        module.write_text("import time; time.sleep(60)")
        with pytest.raises(worker_tool.ToolError, match="did not answer within"):
            worker_tool.run_tool("a_tool", timeout_seconds=0.2)


class TestDoctor:
    def run(
        self, worker: dict[str, object] | Exception, monkeypatch: pytest.MonkeyPatch, *arguments: str
    ) -> int:
        def run_tool(module: str) -> dict[str, object]:
            if isinstance(worker, Exception):
                raise worker
            return dict(worker)

        monkeypatch.setattr(doctor, "run_tool", run_tool)
        return cli.main(["doctor", *arguments])

    def test_all_well(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        facts: dict[str, object] = {
            "device": "cpu (x)",
            "free_bytes": 2_500_000_000,
            "blas": {"name": "openblas", "gflops": 123.456, "fast": True},
            "problems": [],
        }
        assert self.run(facts, monkeypatch) == 0
        out = capsys.readouterr().out
        for expected in ("cpu (x)", "2.50 GB", "name openblas, gflops 123.5, fast yes", "everything works"):
            assert expected in out

    def test_problems_are_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run({"problems": ["slow BLAS [x]: install y"]}, monkeypatch) == 1
        assert "✗ slow BLAS [x]: install y" in capsys.readouterr().out
        assert self.run(worker_tool.ToolError("gone"), monkeypatch) == 1
        assert "examination failed: gone" in " ".join(capsys.readouterr().out.split())

    def test_json(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run({"device": "cpu", "problems": ["p"]}, monkeypatch, "--json") == 1
        facts = msgspec.json.decode(capsys.readouterr().out)
        assert facts["device"] == "cpu"
        assert facts["problems"] == ["p"]
        assert facts["mlxd"] == mlxd.__version__

    def test_every_extension_is_tried(self) -> None:
        stubs = (Path(mlxd.__file__).parent / "_ext").glob("*.pyi")
        assert sorted(doctor.EXTENSIONS) == sorted(path.stem for path in stubs)


class TestBench:
    def test_runs_the_named_module_of_the_checkout(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "bench"
        (folder / "load").mkdir(parents=True)
        (folder / "load" / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
        (folder / "one.py").write_text('if __name__ == "__main__":\n    print("one")\n')
        (folder / "report.py").write_text("")
        (folder / "_inside.py").write_text('if __name__ == "__main__":\n    print("no benchmark")\n')
        monkeypatch.chdir(tmp_path)
        assert cli.main(["bench", "load", "--rate", "5"]) == 3
        assert "['--rate', '5']" in capfd.readouterr().out
        assert cli.main(["bench", "one"]) == 0
        assert cli.main(["bench", "report"]) == 2
        assert "report: no such benchmark (there are load, one)" in capfd.readouterr().err
        assert cli.main(["bench"]) == 2
        capfd.readouterr()
        assert cli.main(["bench", "--help"]) == 0
        assert "benchmarks: load, one\n" in capfd.readouterr().out

    def test_outside_a_checkout(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["bench", "serve"]) == 2
        assert "part of the source checkout" in capsys.readouterr().err
        assert cli.main(["bench", "--help"]) == 0
        assert "part of the source checkout" in capsys.readouterr().out
