"""GaLore: every weight is trained, and no full gradient ever exists.

A linear layer's gradient is a product of two tall factors, so what GaLore wants of it, PᵀG, is made of the factors
themselves: two small products where others make the whole matrix and project it. Sketches for the next subspace are
made alike. Clipping and Adam work on (rank, n) numbers; updates are rounded stochastically into 16 or 8 bits.

matrix.Matrix       a trained matrix: its weight as stored, what arises of its gradient, its subspace
galore.GaLore       the optimizer over matrices and vectors
linear              layers whose backward feeds a Matrix
"""
