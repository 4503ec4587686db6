"""Attention over packs: which token sees which, and the kernels that compute it."""
