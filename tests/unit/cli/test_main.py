"""How commands are found, and how the program ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from ostinato.cli import main
from ostinato.errors import DeviceError


class _Raises:
    """A command's module whose command ends with an error."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def register(self, app: object) -> None:
        error = self._error

        def generate() -> None:
            raise error

        app.command(name="generate")(generate)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.load_command(name).name == name
    assert main.execute([name, "--help"]) == 0
    assert f"Usage: ostinato {name}" in capsys.readouterr().out


def test_help_lists_all_commands_without_pytorch() -> None:
    code = (
        "import sys; from ostinato.cli.main import execute; assert execute([]) == execute(['-h']) == 0; "
        "sys.exit(3 if 'torch' in sys.modules or 'rich' in sys.modules else 0)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    for name, (_, line) in main.COMMANDS.items():
        assert f"  {name} " in shown.stdout
        assert line.split(" a CUDA")[0] in shown.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ostinato ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "Did you mean 'generate'?"),
        (["--nonsense"], "No such option: --nonsense"),
        (["models", "--nonsense"], "ostinato models --help"),
        (["models", "extra"], "unexpected extra argument"),
        (["generate", "hi", "--seed", "x"], "'--seed'"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (DeviceError("no such device; use --device cpu"), 2, "error: no such device; use --device cpu\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_how_a_command_ends(
    error: BaseException,
    code: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(main.importlib, "import_module", lambda name: _Raises(error))
    assert main.execute(["generate"]) == code
    assert capsys.readouterr().err == shown


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.importlib, "import_module", lambda name: _Raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main.execute(["generate"])


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import sys, types; from ostinato.cli import main\n"
        "def models():\n    for at in range(100000): print('line', at, flush=True)\n"
        "module = types.SimpleNamespace(register=lambda app: app.command(name='models')(models))\n"
        "sys.modules[main.COMMANDS['models'][0]] = module\n"
        "sys.argv = ['ostinato', 'models']; main.run()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.returncode is not None
        assert process.stderr.read() == ""
