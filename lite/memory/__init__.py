"""The memory room: the levers that trade time for memory, and the meter that counts what a step holds.

checkpoint recomputes layers in backward instead of keeping what they made; offload lets what they do keep wait in host
memory. embedding has the input embedding there, stream the layers' frozen weights; host is the way there and back.
tiles cuts an MLP. levers pulls them all; meter and marks count, workspace tells what operators hold inside.
"""
