"""What a tier remembers about one request: the hashes of its blocks, and lookup results for its keys."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Prompt:
    """rows: hash by (group, end), for rows that were looked up or stored.  windows: ends that have a window in the
    store.

    verdicts, waiting, unsent: used by `antefix_engines.vllm.lookups`, in vLLM's thread only.
    Threads of ours read `rows` and set `windows`, one whole value at a time.
    """

    req_id: str
    rows: dict[tuple[int, int], bytes] = field(default_factory=dict)
    windows: frozenset[int] = frozenset()
    num_learned: int = 0
    verdicts: dict[bytes, bool] = field(default_factory=dict)
    waiting: dict[bytes, float] = field(default_factory=dict)
    unsent: list[Asked] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Asked:
    """A key that vLLM looks up.  position: number of the prompt's tokens up to the row's end."""

    key: bytes
    hash: bytes
    group: int
    position: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of vLLM's host memory to be stored or filled."""

    key: bytes
    hash: bytes
    group: int
    position: int
    chunk: int
