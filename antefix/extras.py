"""How to install an extra of Antefix (an optional set of packages) next to what is installed now.

Antefix is not on PyPI, so `pip install 'antefix[worker]'` finds nothing. The command that works depends on where the
installed Antefix came from: a checkout, or a wheel.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

_CHECKOUT: Final = Path(__file__).resolve().parents[1]


def install_command(extra: str) -> str:
    """The command that installs an extra, such as `pip install '.[worker]' in the checkout /src/antefix`.

    extra: its name in pyproject.toml, "" for Antefix without extras.
    """
    extras = f"[{extra}]" if extra else ""
    if (_CHECKOUT / "pyproject.toml").is_file():
        return _in_checkout(_CHECKOUT, extras)
    noted = _noted_by_pip()
    url = str(noted.get("url", ""))
    path = unquote(urlsplit(url).path)
    if not url:
        return f"pip install 'antefix-{_version()}-py3-none-any.whl{extras}', with the path of the release's wheel"
    if "dir_info" in noted:
        return _in_checkout(path, extras)
    if url.startswith("file:"):
        return f"pip install {shlex.quote(f'{path}{extras}')}"
    source = f"{noted['vcs_info'].get('vcs', 'git')}+{url}" if "vcs_info" in noted else url
    return f"pip install {shlex.quote(f'antefix{extras} @ {source}')}"


def needs(what: str, package: str, extra: str) -> str:
    """The message for a package that is not installed.  what: what the package is for, such as "a plot"."""
    return f"{what} needs {package}: {install_command(extra)}"


def _in_checkout(path: Path | str, extras: str) -> str:
    return f"pip install '.{extras}' in the checkout {path}"


def _noted_by_pip() -> dict[str, Any]:
    """Where pip installed Antefix from: the URL, and whether it is a directory or a repository (PEP 610).

    Empty if pip noted nothing, as for a wheel from an index or from `--find-links`.
    """
    # Imported only for a message, because it would cost each start of each process some 30 ms.
    from importlib import metadata

    try:
        noted = json.loads(metadata.distribution("antefix").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("antefix")
    except metadata.PackageNotFoundError:
        return "VERSION"
