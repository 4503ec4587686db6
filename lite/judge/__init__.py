"""The judge room: what a model says of rows that it is not trained on, and what losses would make of that.

score.py scores every row of a file: subject.py says which model, rows.py reads the file, model.py loads, compared.py
brings the reference's word, tally.py sums up. what_if.py tries losses and betas on what a run kept of its held-out
rows, without a model: kept.py reads that, candidates.py says which losses fit.
"""

from lite.judge.score import Scores, score
from lite.judge.what_if import WhatIf, course, what_if

__all__ = ["Scores", "WhatIf", "course", "score", "what_if"]
