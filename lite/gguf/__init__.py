"""The GGUF room: llama.cpp's file format, written in one pass over a model's weights.

types.py names the file types, mixtures.py says which tensor of a file gets which; quantise.py turns rows into blocks,
by llama.cpp's own quantiser. architectures/ says which tensors of a checkpoint become which of the file, and
planned.py what one is made of; metadata.py and vocabulary.py what else the file must say: tokenizer.py reads the
tokenizer, pre_tokenizers.py knows how byte-level ones cut a text, sentence_pieces.py and space_prefix.py the others,
special_tokens.py what begins and ends. file.py is the file, its header first, then its tensors as they come; write.py
brings it all together. imatrix.py weighs the columns of a matrix by what they are multiplied with, which activations.py
measures. llama.py runs llama.cpp in this process, to read back what was written, with the strings of probes.py;
heard.py is how it learns why something failed.
"""
