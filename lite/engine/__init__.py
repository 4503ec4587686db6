"""The step: packs through the model to log-probs (`forward`), to gradients (`step`), or to numbers alone (`score`).

Training, evaluation, planning and profiling run these same functions; `selfcheck` compares them with the plain model.
"""
