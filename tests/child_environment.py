"""The environment of a Python that a test starts: it finds the packages wherever this one found them."""

import os
import sys


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
