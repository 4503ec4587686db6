"""The GGUF room: llama.cpp's file format, written in one pass over a model's weights.

types.py names the file types, mixtures.py says which tensor of a file gets which; quantise.py turns rows into blocks,
by llama.cpp's own quantiser. architectures.py says which tensors of a checkpoint become which of the file,
metadata.py and vocabulary.py what else the file must say. file.py is the file: its header first, then its tensors as
they come; write.py brings it all together. imatrix.py weighs the columns of a matrix by what they are multiplied with.
llama.py runs llama.cpp in this process, to read back what was written.
"""
