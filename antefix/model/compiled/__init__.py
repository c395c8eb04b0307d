"""The parts of a CPU's forward pass between its matrix products, compiled by Numba: torch's bits in fewer calls.

A decode step of a small model is some thousand operations of a few microseconds each; with the compiled kernels it is
some hundred operations. The compiled kernels are optional: without Numba, or where a kernel's bits differ from torch's
on this machine, torch computes everything. The compiled kernels must not know of sequences, pools or services.
"""
