"""What goes wrong between a client and the tests' Hub, drawn from a seed."""

import random
import threading


# What a fault does to a request: an answer of 500, of 429, none at all for too long, a connection cut in the middle of
# the request, or cut after the request was carried out.
FAULTS = ("500", "429", "stall", "cut", "lost")


class Faults:
    """Draws `total` faults from a seed; thread-safe. `done` says which requests met which."""

    def __init__(self, total: int, seed: int = 0, rate: float = 0.5, kinds: tuple[str, ...] = FAULTS) -> None:
        self.left, self.rate, self.kinds = total, rate, kinds
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.done: list[tuple[str, str]] = []

    def draw(self, request: str) -> str | None:
        with self.lock:
            if not self.left or self.random.random() >= self.rate:
                return None
            self.left -= 1
            self.done.append((request, self.random.choice(self.kinds)))
            return self.done[-1][1]
