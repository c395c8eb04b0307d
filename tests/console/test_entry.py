"""How a command that runs in its own process begins and ends."""

import argparse
import subprocess
import sys

import pytest

from antefix.errors import Unauthenticated
from antefix_console import cli, entry
from tests.child_environment import child_environment

PROGRAM = """
import argparse, atexit, gc, sys
from antefix_console import cli, entry

def run(parsed):
    print(gc.isenabled(), gc.get_freeze_count() > 1000)
    if sys.argv[1] == "raise":
        raise SystemExit(4)
    return 3

cli.parser_of = lambda args: (argparse.ArgumentParser(), run)
argparse.ArgumentParser.parse_args = lambda self, args: argparse.Namespace(command="serve")
atexit.register(print, "found by Python")
code = entry.main()
atexit.register(print, "left")
sys.exit(code)
"""


def test_an_interruption_while_modules_are_imported_shows_no_traceback(monkeypatch):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "antefix_console.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "antefix_console.cli", raising=False)
    monkeypatch.setattr(sys, "argv", ["antefix", "doctor"])
    monkeypatch.setattr(entry.atexit, "register", lambda *_: None)
    monkeypatch.setattr(entry.gc, "disable", lambda: None)
    # Set first, so that the variable is taken away again after the test.
    monkeypatch.setenv("GRPC_VERBOSITY", "")
    monkeypatch.delenv("GRPC_VERBOSITY")
    assert entry.main() == 130
    # Set before gRPC is imported: its lines about closed connections are no faults, and no JSON.
    assert entry.os.environ["GRPC_VERBOSITY"] == "ERROR"


def test_the_first_help_is_for_users_not_for_programmers(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "a disaggregated prefix cache" in told and "import" not in told.partition("positional")[0]
    assert "`antefix up` is the place to start" in told


def test_a_refused_secret_is_named_with_its_file(tmp_path, monkeypatch, capsys):
    """A command in a directory of another deployment shows that deployment's secret."""
    (tmp_path / "secret").write_text("aa" * 32)
    (tmp_path / "secret").chmod(0o600)

    def refused(_):
        raise Unauthenticated("the service token was not made with this deployment's secret for this call")

    monkeypatch.setattr(cli, "parser_of", lambda _: (argparse.ArgumentParser(), refused))
    given = argparse.Namespace(command="window", data_dir=tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *_: given)
    assert cli.main(["window"]) == 1
    assert f"this command showed {tmp_path}/secret: name the deployment's own --data-dir" in capsys.readouterr().err


@pytest.mark.services
@pytest.mark.parametrize(("how", "code", "said"), [("return", 3, "left"), ("raise", 4, "found by Python")])
def test_a_command_ends_with_its_code_and_all_that_it_had_to_say(how, code, said):
    """Whether the operating system or Python frees the process's memory.

    The garbage collector skips imported objects.
    """
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["True True", said]
