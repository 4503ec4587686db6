"""The model room: which models there are, how one is loaded and quantised, and what is trained on top of it.

catalog knows names and shapes without a network; load brings a frozen base to its device; adapters puts LoRA on it,
saves and loads it; lora is the forward of an adapted layer; layers finds the parts of any architecture; attention lets
branches of a pack see their ancestors only. Imported by name, so that the catalogue needs no torch.
"""
