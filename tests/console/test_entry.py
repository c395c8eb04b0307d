"""How a command that runs in its own process begins and ends."""

import subprocess
import sys

import pytest

from antefix_console import entry
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
    assert entry.main() == 130


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
