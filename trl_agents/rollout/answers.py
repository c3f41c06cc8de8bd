# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One reply to each of many prompts: what one-turn tasks (questions) need instead of the loop of `play.py`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from .generation import Backend, Reply


def answer_prompts(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    n_slots: int,
    luck: Sequence[tuple[int, ...]] | None = None,
    progress: bool = False,
    description: str = "Answers",
) -> list[Reply]:
    """
    Let `backend` reply to `prompts`. A place is refilled as soon as it is free.

    Args:
        backend ([`Backend`]):
            Generates the replies.
        prompts (`Sequence[Sequence[int]]`):
            Token ids.
        max_new_tokens (`int`):
            Token budget of one reply.
        n_slots (`int`):
            How many places the backend has.
        luck (`Sequence[tuple[int, ...]]`, *optional*):
            What seeds the sampling of each reply. Defaults to its number.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        description (`str`, *optional*, defaults to `"Answers"`):
            What the bar is called.

    Returns:
        `list[Reply]`, in the order of the prompts.
    """
    replies: list[Reply | None] = [None] * len(prompts)
    queue = deque(range(len(prompts)))
    free = list(range(n_slots))[::-1]
    asked: dict[int, int] = {}  # slot -> number of the prompt
    with tqdm(total=len(prompts), desc=description, unit="reply", leave=False, disable=not progress) as bar:
        while queue or asked:
            while queue and free:
                number, slot = queue.popleft(), free.pop()
                asked[slot] = number
                rng = np.random.default_rng(luck[number] if luck is not None else number)
                backend.submit(slot, list(prompts[number]), max_new_tokens, rng)
            for slot, reply in backend.step():
                replies[asked.pop(slot)] = reply
                free.append(slot)
                bar.update()
        backend.drain()
    return replies
