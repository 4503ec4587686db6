"""The judge room: what a model says of rows that it is not trained on, and what losses would make of that.

what_if.py tries losses and betas on what a run kept of its held-out rows, without a model: kept.py reads that,
candidates.py says which losses fit.
"""
