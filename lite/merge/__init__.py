"""The merge room: a base and what was trained on it become one model, a few rows at a time, never whole in memory.

checkpoint.py reads the shards of a model's folder, packed.py what bitsandbytes quantised; adapter.py is what an adapter
adds, update.py to one tensor, names.py to which; weights.py is both together; nf4.py is the base as training in four
bits saw it. source.py finds all that belongs to a run, an adapter or a model's folder; onto.py says which of two bases
to merge onto. folder.py writes a model's folder: companions.py its tokenizer, template and generation config, card.py
its model card; aside.py gives it its name when it is whole. merge.py is the story of `lite merge`.
"""
