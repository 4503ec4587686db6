"""The serve room: talk to a model in the terminal (chat.py), or serve it to other programs over HTTP (serve.py).

conversation.py is what was said, and who speaks: a GGUF in llama.cpp (file.py), or a run or a model in transformers
(model.py). exported.py is the file that stands for a run when it is served; engines.py has the commands of others.
"""
