"""Kernels in Triton for what torch does in several passes over memory: each an operator of torch, with a plain twin.

The twin stands where the kernel is called (`model/norms.py`, `model/mlp.py` …) and runs everywhere else. As operators
they are seen by a dry run on meta, which counts what they make and move.
"""
