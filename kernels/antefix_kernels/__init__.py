"""Triton kernels of DeepSeek-V4's cache path and of a layer's per-token computations. The kernels take plain tensors
and integers, and import nothing of Antefix.

    number_formats.py             byte layout of packed entries and keys
    torch_reference.py            PyTorch oracles, float64-capable
    rounding.py                   device functions: FP8, FP4, BF16 rounding
    finish.py                     device functions: norm, RoPE, records
    pack.py                       compress and pack, window_pack
    gather.py                     unpack, copy of records
    index_queries.py              index queries, rotated and rounded
    index_scores.py               index scores of FP4 keys; index_scores_hopper.py in Gluon
    topk.py                       exact top-k, ties to the lowest index
    decode_attention.py           sparse, HCA and window attention; decode_attention_hopper.py in Gluon
    prefill_attention.py          the same over entries decoded once
    merge.py                      partial attention outputs put together
    operands.py                   what attention takes besides entries
    tiles_hopper.py, hopper.py    what the Gluon kernels share; whether they run here
    linear.py                     products, row by row
    tokens.py                     norms, rotation, mixing, experts' sums

All but number_formats.py and torch_reference.py need Triton. `TRITON_INTERPRET=1` runs them on the CPU. The oracle of
the same name in torch_reference.py specifies each kernel; docs/results/kernels.md has the measurements.
"""
