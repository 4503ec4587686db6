"""Draws: random numbers that depend on the seed, the step and what they are for, and on nothing that was drawn before.

So a run that was resumed, or a step that was taken again, draws what it would have drawn.
"""

import hashlib

import torch

_PHILOX = 4  # numbers of Philox to a count, and the least by which an offset may move


class Draws:
    """Generators of one optimizer, one for each device."""

    def __init__(self, seed: int) -> None:
        self.seed, self.steps = seed, 0
        self._rounding: dict[torch.device, torch.Generator] = {}

    def restart(self, steps: int) -> None:
        """Rounding draws anew, as after so many steps."""
        self.steps = steps
        self._rounding.clear()

    def rounding(self, device: torch.device) -> torch.Generator | None:
        """For stochastic rounding: one draw after another within a step. None on meta, where nothing is drawn."""
        if device.type == "meta":
            return None
        if device not in self._rounding:
            self._rounding[device] = torch.Generator(device).manual_seed(self._seed("rounding", self.steps))
        return self._rounding[device]

    def of(self, device: torch.device, *place: str | int) -> torch.Generator | None:
        """For one purpose, whatever the step: always the same draws. None on meta."""
        return None if device.type == "meta" else torch.Generator(device).manual_seed(self._seed(*place))

    def _seed(self, *place: str | int) -> int:
        digest = hashlib.blake2b(repr((self.seed, *place)).encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1


def key(generator: torch.Generator | None) -> tuple[int, int]:
    """For a kernel that draws by itself: a seed, and the first of 2³⁶ counts that nobody else has of this generator.

    Nothing is waited for. Without a generator, on meta, any.
    """
    if generator is None:
        return 0, 0
    if generator.device.type != "cuda":
        return int(torch.randint(2**62, (), generator=generator)), 0
    state = generator.get_state()  # on the host: a seed and an offset
    numbers = state.view(torch.int64)
    seed, offset = numbers.tolist()
    numbers[1] += _PHILOX
    generator.set_state(state)
    return seed, (offset // _PHILOX + 1) << 36  # the generator's own numbers are at counts from 0 on
