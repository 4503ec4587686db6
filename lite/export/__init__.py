"""The export room: a run or a model's folder becomes what other programs run, and proves it.

One file a target, each with `write` and `check`: safetensors.py, gguf.py, adapter.py, gguf_adapter.py, ollama.py,
gptq.py. proof.py compares a written GGUF with the model that it was made of.
"""
