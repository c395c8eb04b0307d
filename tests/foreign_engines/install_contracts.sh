#!/bin/sh
# SGLang's and LMCache's own classes, for the contract tests of their tiers, into an environment of its own (ignored by git):
# the wheels without what they need to run models, and the small packages that importing them takes; 0.6 GB, some minutes.
# All else comes from the environment that `make setup` made. Usage: install_contracts.sh INTO VENV
set -eu
into=$1
base=$2
say() { echo "[$(date +%H:%M:%S)] $*"; }
say "SGLang's and LMCache's classes in $into: 0.6 GB, some minutes"
test -x "$into/bin/python" || "$base/bin/python" -m venv "$into"
site=$("$into/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/antefix-setup.pth"
pip="$into/bin/python -m pip install --quiet --disable-pip-version-check --no-deps"
say "1 of 3: sglang 0.5.23 and lmcache 0.5.6, without dependencies"
$pip sglang==0.5.23 lmcache==0.5.6
say "2 of 3: what importing SGLang takes"
$pip orjson==3.13.0 pybase64==1.5.1 ipython==9.18.1 traitlets==5.16.1 aiohttp==3.14.5 multidict==7.2.1 yarl==1.25.1 \
  propcache==0.5.4 aiohappyeyeballs==2.7.1 aiosignal==1.4.0 frozenlist==1.8.0 dill==0.4.1 apache-tvm-ffi==0.1.15.post2 \
  sentencepiece==0.2.3 compressed-tensors==0.20.1 loguru==0.7.3 gguf==0.19.0
say "3 of 3: what importing LMCache takes"
$pip numba==0.68.1 llvmlite==0.50.0 py-cpuinfo==9.0.0 cachetools==8.0.2
du -sh "$into" | cut -f1
say "done"
