"""The serve room: talk to a model in the terminal (chat.py), or serve it to other programs over HTTP (serve.py)."""
