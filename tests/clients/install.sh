#!/bin/sh
# The real programs that tests/clients drives, pinned, into .clients/ (ignored by git): 1.7 GB, a minute or two.
# Needs node 20 and npm, and Python 3.11 (PYTHON=... to choose it).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
into=$here/../../.clients
mkdir -p "$into"
cp "$here/package.json" "$into/package.json"
# Each program's own script fetches nothing: it puts the right binary, which npm has brought, into place.
npm install --prefix "$into" --no-audit --no-fund --loglevel=error
test -x "$into/python/bin/python" || "${PYTHON:-python3}" -m venv "$into/python"
"$into/python/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
echo "installed into $into"
