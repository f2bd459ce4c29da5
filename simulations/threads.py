"""How many cores the arithmetic of a process takes."""

from __future__ import annotations


def one_thread() -> None:
    """From now on torch and numpy take one core each time: for a process that is one of as many as there are cores."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    torch.set_num_threads(1)
    threadpool_limits(limits=1)  # numpy's BLAS has threads of its own
