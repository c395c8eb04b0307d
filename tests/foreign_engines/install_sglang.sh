#!/bin/sh
# SGLang's own classes for the contract tests of AntefixHiCache, into an environment of its own (ignored by git): its wheel
# without what it needs to run models, and the small packages that importing it takes; 0.3 GB, a minute. Everything else comes
# from the environment that `make setup` made. Usage: install_sglang.sh INTO VENV
set -eu
into=$1
base=$2
say() { echo "[$(date +%H:%M:%S)] $*"; }
say "SGLang's environment in $into: 0.3 GB, a minute"
test -x "$into/bin/python" || "$base/bin/python" -m venv "$into"
site=$("$into/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/antefix-setup.pth"
pip="$into/bin/python -m pip install --quiet --disable-pip-version-check --no-deps"
say "1 of 2: sglang 0.5.23, without dependencies"
$pip sglang==0.5.23
say "2 of 2: what importing it takes"
$pip orjson pybase64 ipython traitlets aiohttp multidict yarl propcache aiohappyeyeballs aiosignal frozenlist dill \
  apache-tvm-ffi sentencepiece compressed-tensors loguru gguf
du -sh "$into" | cut -f1
say "done"
