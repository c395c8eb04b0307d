"""A CPU's forward pass between its products, compiled by Numba: the same bits as torch's operations, in fewer calls.

A decode step of a small model is some thousand operations of a few microseconds; with these kernels it is some hundred.
Optional: without Numba, and where a kernel's bits are not torch's on this machine, torch computes all of it.
Nothing here may know of sequences, pools or services.
"""
