"""Names the sources of the compiled kernels, so that compiled code on disk is used only with the sources that it is of.

Numba finds compiled code by the time and size of the kernel's own file. It does not notice a change of another file
whose functions the kernel calls: after an update it would run the old code, with the new code's memory layouts.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

# Found in each file whose functions are compiled, and in no file that only calls kernels.
_IS_COMPILED = re.compile(rb"\b(intrinsics?|llvmlite)\b")


@functools.cache
def sources_digest(folder: Path = Path(__file__).parent) -> str:
    """A digest of the files in a folder whose functions are compiled."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.py")):
        source = path.read_bytes()
        if _IS_COMPILED.search(source):
            digest.update(b"%s %d " % (path.name.encode(), len(source)) + source)
    return digest.hexdigest()
