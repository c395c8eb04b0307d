"""Triton kernels of DeepSeek-V4's cache path, and of what a layer computes for each token alone. Plain tensors and
integers in, nothing of Antefix imported.

    formats.py    byte layout of packed entries and keys       reference.py  PyTorch oracles, float64-capable
    rounding.py   device functions: FP8, FP4, BF16 rounding     finish.py     device functions: norm, RoPE, records
    pack.py       compress and pack, window_pack                gather.py     unpack, copy of records
    indexer.py    index scores of FP4 keys                      topk.py       exact top-k, ties to the lowest index
    attention.py  sparse, HCA and window attention              prefill.py    the same over entries decoded once
    operands.py   what attention takes besides entries         linear.py     products, row by row
    tokens.py     norms, rotation, mixing, experts' sums

Triton is needed by all but formats.py and reference.py. `TRITON_INTERPRET=1` runs them on the CPU. Each kernel is
specified by the oracle of the same name in reference.py; docs/KERNELS.md has the measurements.
"""
