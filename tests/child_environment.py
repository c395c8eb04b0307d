"""The environment for a Python process that a test starts, which finds the packages where this process finds them."""

import os
import sys


def child_environment() -> dict[str, str]:
    """This environment. Its PYTHONPATH begins with the folders that tests/conftest.py adds for child processes."""
    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys(path for path in (*first, *sys.path) if path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
