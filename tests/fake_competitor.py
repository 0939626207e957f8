"""A competitor of a benchmark that does nothing but wait; a child process imports it, so it imports little."""

import time


class Fake:
    """A competitor that sleeps and says so."""

    def __init__(self, warm_up_s: float = 0.0, fails: bool = False) -> None:
        self.warm_up_s, self.fails = warm_up_s, fails

    def warm_up(self) -> dict:
        time.sleep(self.warm_up_s)
        return {"first_losses": [1.0]}

    def round(self, seconds: float = 0.0) -> float:
        if self.fails:
            raise ZeroDivisionError("a round went wrong")
        time.sleep(seconds)
        return 0.5

    def memory(self) -> int:
        return 2**30
