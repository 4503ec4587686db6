"""The reference: its log-probs are computed once, kept on disk, and looked up; its model is never beside the policy.

What a row is found by is made in `weights`: digests of the model's files, of an adapter, of token ids. `store` is the
cache itself, over `database` (the SQLite file, and what becomes of a broken one), `rows` (a completion as bytes with a
checksum) and `upkeep` (listing, pruning, verifying). `fill` computes what is missing, `precompute` knows whose numbers
a recipe wants, and `lookup` hands them to the batches. `merge` takes in another cache's rows; `columns` writes the
data's own rows with the log-probs beside them.
"""
