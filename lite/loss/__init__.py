"""Mathematics: from hidden states to log-probabilities (`head`, `softmax`), and from those to losses (`losses`).

`Logps` is the waist of lite: nothing here knows of models or data, and a new loss is one function in `losses/`.
"""
