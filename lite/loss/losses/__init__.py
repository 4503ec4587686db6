"""The losses: pure functions of Logps, one per method; the function's name is the verb of the command line.

A function under `@loss` in any file of this folder is a loss. Positional parameters are data, keyword-only ones
hyperparameters (`lite/signatures.py`); the docstring's `name: …` lines are their help. Sums over tokens are `total`,
averages `mean`; σ is the logistic function; a loss per example comes back, never their mean.
"""
