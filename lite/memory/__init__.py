"""The memory room: the levers that trade time for memory.

checkpoint recomputes layers in backward instead of keeping what they made.
"""
