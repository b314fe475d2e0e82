"""Early stopping: whether the held-out loss has stopped falling.

In: the held-out loss of each evaluation, in order. Out: whether the run should end. What was counted is saved with
every checkpoint, so that a continued run ends at the same step as one that was never stopped.
"""

import math
from typing import Any

from jaxsft.hosts.exchange import first_text


class Patience:
    """Counts evaluations without a smaller held-out loss than the smallest so far.

    With a patience of 2 and losses 5, 3, 4, 3: it is over after the fourth, which is no smaller than the second.

    Args:
        most: evaluations in a row that may bring nothing (`eval.patience`); None: any number.
        saved: what `state` gave when this step was saved; nothing where the run begins.
    """

    def __init__(self, most: int | None, saved: dict[str, Any]) -> None:
        self._most = most
        best = saved.get("best")
        self.best = math.inf if best is None else float(best)
        """The smallest held-out loss so far, infinity where there was none."""
        self.best_step: int | None = saved.get("best_step")
        self.in_vain: int = saved.get("in_vain", 0)
        """Evaluations since then."""
        self._seen: int = saved.get("seen", -1)
        self._last = -1, math.inf

    def see(self, step: int, loss: float) -> None:
        """Takes the held-out loss after `step` steps. Every process must call this; all count what process 0 found."""
        loss = float(first_text("held-out loss", repr(float(loss))))
        self._last = step, loss
        if step <= self._seen:
            return  # A run that was stopped before its first step looks at its first model again.
        self._seen = step
        if loss < self.best:
            self.best, self.best_step, self.in_vain = loss, step, 0
        elif step > 0:
            self.in_vain += 1

    def loss_at(self, step: int) -> float:
        """The held-out loss after `step` steps, infinity where it was not measured, and before the first one: the model
        that a run begins with is none of its results, whether the run was stopped there or not."""
        return self._last[1] if self._last[0] == step > 0 else math.inf

    @property
    def is_over(self) -> bool:
        """Whether the run should end here."""
        return self._most is not None and self.in_vain >= self._most

    def state(self) -> dict[str, Any]:
        """What a continued run must know; plain JSON."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "best_step": self.best_step, "in_vain": self.in_vain, "seen": self._seen}

    def describe(self) -> str:
        """Why the run ends here, in a line."""
        best = "" if self.best_step is None else f" than {self.best:.4f}, that after step {self.best_step}"
        return f"{self.in_vain} evaluations in a row without a smaller held-out loss{best} (eval.patience {self._most})"
