"""Kernels that read and advance the window states of many sequences: rings, and the tails and overlaps of compressors.

All arrays are float32 or int64, contiguous, and addressed by `Tensor.data_ptr()`. `antefix.model.compiled.steps` makes
the arrays of addresses; the torch code that these kernels replace is in `antefix.model.steps`.

Shapes:  S = sequences, G = groups that close, m = ratio, O = a compressor's columns, C = entry width, L = layers.
"""

from __future__ import annotations

from enum import IntEnum

from antefix.model.compiled.intrinsics import floats, integers, kernel, plain


class Job(IntEnum):
    """Indices into the array of one compressor. NEW: address of the step's rows [2, S, O].  TAIL, OVERLAP: the columns
    of the table that have the addresses of these parts of a state (OVERLAP: -1 for HCA).  GROUPS: address of the closed
    groups' rows [2, G, m, O].  NUM_GROUPS: G.  NUMBERS: address of each sequence's number among the closed groups."""

    NEW = 0
    COLUMNS = 1
    RATIO = 2
    WIDTH = 3
    TAIL = 4
    OVERLAP = 5
    GROUPS = 6
    NUM_GROUPS = 7
    NUMBERS = 8


NUM_FIELDS = len(Job)
NEW, COLUMNS, RATIO, WIDTH, TAIL, OVERLAP, GROUPS, NUM_GROUPS, NUMBERS = (int(field) for field in Job)


@plain
def _copy(to: int, given: int, many: int) -> None:
    made, row = floats(to, 0, many), floats(given, 0, many)
    for c in range(many):
        made[c] = row[c]


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def gather_groups(overlaps: int, job: int, closing: int, num: int, table: int, width: int, total: int) -> None:
    """The rows of the groups that close now, from the tails and the new rows, to the job's `GROUPS`; and the overlaps
    [2, G, m, C] before them, if the compressor has any.

    closing [G]: sequences.  table [S, width]: addresses of parts of states.  total: S.
    """
    j = integers(job, 0, NUM_FIELDS)
    columns, ratio = j[COLUMNS], j[RATIO]
    for g in range(num):
        s = integers(closing, g, 1)[0]
        row = integers(table, s * width, width)
        for half in range(2):
            to = j[GROUPS] + 4 * (half * num + g) * ratio * columns
            _copy(to, row[j[TAIL]] + 4 * half * ratio * columns, (ratio - 1) * columns)
            _copy(to + 4 * (ratio - 1) * columns, j[NEW] + 4 * (half * total + s) * columns, columns)
            if j[OVERLAP] >= 0:
                size = ratio * j[WIDTH]
                _copy(overlaps + 4 * (half * num + g) * size, row[j[OVERLAP]] + 4 * half * size, size)


@kernel("void(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def keep_tokens(which: int, num: int, positions: int, table: int, width: int, total: int, jobs: int, num_jobs: int,
                windows: int, layers: int, W: int, C: int) -> None:  # fmt: skip
    """Put the tokens of the sequences `which` [num] into their states.

    table [S, width]: addresses of parts of states, the ring [L, W, C] first.  jobs [num_jobs, NUM_FIELDS].
    windows [L]: address of each layer's new window rows [S, C].  total: S.
    """
    for w in range(num):
        s = integers(which, w, 1)[0]
        position, row = integers(positions, s, 1)[0], integers(table, s * width, width)
        for layer in range(layers):
            to = row[0] + 4 * (layer * W + position % W) * C
            _copy(to, integers(windows, layer, 1)[0] + 4 * s * C, C)
        for number in range(num_jobs):
            j = integers(jobs, number * NUM_FIELDS, NUM_FIELDS)
            columns, ratio = j[COLUMNS], j[RATIO]
            for half in range(2):
                if (position + 1) % ratio:
                    to = row[j[TAIL]] + 4 * (half * ratio + position % ratio) * columns
                    _copy(to, j[NEW] + 4 * (half * total + s) * columns, columns)
                elif j[OVERLAP] >= 0:
                    group = half * j[NUM_GROUPS] + integers(j[NUMBERS], s, 1)[0]
                    for i in range(ratio):
                        to = row[j[OVERLAP]] + 4 * (half * ratio + i) * j[WIDTH]
                        _copy(to, j[GROUPS] + 4 * (group * ratio + i) * columns, j[WIDTH])
