"""Whether gradients are pending: between accumulation steps, what a checkpoint would have to hold is larger."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


class GradientWatch:
    """Knows, for each tracked optimizer, in which step it last stepped."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], step: Callable[[], int]) -> None:
        self._optimizers = dict(optimizers)
        self._step = step
        self._stepped = dict.fromkeys(self._optimizers, -1)
        self._handles = [
            optimizer.register_step_post_hook(lambda o, a, k, name=name: self._note(name))  # type: ignore[misc]
            for name, optimizer in self._optimizers.items()
        ]

    def pending(self) -> bool:
        """Whether an optimizer holds gradients that no step has used yet.

        One that stepped since the last batch was handed out holds none, even if its gradients were not cleared.
        """
        now = self._step()
        return any(
            self._stepped[name] != now
            and any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            for name, optimizer in self._optimizers.items()
        )

    def stepped(self) -> bool:
        """Whether every optimizer stepped since the last batch was handed out (and there is one)."""
        now = self._step()
        return bool(self._stepped) and all(step == now for step in self._stepped.values())

    def forget(self) -> None:
        """Another state was loaded: no step of this process led to it."""
        self._stepped = dict.fromkeys(self._optimizers, -1)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str) -> None:
        self._stepped[name] = self._step()
