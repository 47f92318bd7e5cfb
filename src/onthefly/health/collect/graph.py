"""Which operations a backward pass will run."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

_MOST = 20_000  # nodes; a backward pass of a large transformer has some thousands


def operations(output: Any) -> set[str]:
    """The names of the nodes behind a forward pass's output, such as ``AddmmBackward0``. Only looked at: nothing is run or kept."""
    values = list(output.values()) if isinstance(output, dict) else output
    values = list(values) if isinstance(values, list | tuple) else [values]
    queue = deque(v.grad_fn for v in values if isinstance(v, torch.Tensor) and v.grad_fn is not None)
    seen, names = set(queue), set()
    while queue and len(seen) < _MOST:
        node = queue.popleft()
        names.add(node.name())
        for above, _ in node.next_functions:
            if above is not None and above not in seen:
                seen.add(above)
                queue.append(above)
    return names
