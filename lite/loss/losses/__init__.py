"""The losses: pure functions of Logps, one per method; the function's name is the verb of the command line.

A function under `@loss` in any file of this folder is a loss. Positional parameters are data, keyword-only ones
hyperparameters (`lite/signatures.py`); the docstring's `name: …` lines are their help. Sums over tokens are `total`,
averages `mean`; σ is the logistic function; a loss per example comes back, never their mean.

`log p/p_ref` is the log ratio of a completion's total under policy and reference, and beta times it the reward.
Hyperparameters default to the method's paper. Learning rates are for adapters: about ten times the paper's, which is
for all weights, unless the docstring says otherwise.

dpo.py         functions of the difference of a pair's log ratios
offset.py      the same with a gap to win by: of the row's own, or trained
anchored.py    each completion against a target of its own
coupled.py     pairs compared across the batch
tokens.py      DPO that looks into the tokens: weighed by likelihood, or by length
kto.py         single completions with a label
likelihood.py  no reference model
distill.py     a larger model's distribution
"""
