"""How a command that runs in its own process begins and ends."""

import subprocess
import sys

import pytest

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
