"""The environment of a Python that a test starts: it finds the packages wherever this one found them."""

import os
import sys


def child_environment() -> dict[str, str]:
    """PYTHONPATH begins with what tests/conftest.py put there for children alone."""
    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys(path for path in (*first, *sys.path) if path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
