"""Which tensors of a checkpoint become which of a GGUF file, and what the file must say of the model.

architecture.py is what a family must tell; llama.py, qwen.py, gemma.py and phi.py are the families. layers.py,
numbers.py and refusals.py are what they share: names and shapes of tensors, keys and values, and what llama.cpp does
not do. table.py finds a model's family, and plans.
"""
