"""Where media stand in a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang_mminfer import mends

if TYPE_CHECKING:
    import torch

NO_TOKEN = -1


def runs_of(
    find: Callable[[torch.Tensor, int], list[tuple[int, int]]], input_ids: torch.Tensor, mm_token_id: int
) -> list[tuple[int, int]]:
    """The first and the last position of each run of a token.

    Args:
        find: SGLang's function for it. It takes the ids for a ring, and a run that ends the prompt for the begin of one
            at its start. So it gets the ids with another token behind them.
        input_ids: (n,).
    """
    if mends.active("media_at_both_ends"):
        ids = input_ids.new_full((len(input_ids) + 1,), NO_TOKEN)
        ids[:-1] = input_ids
        input_ids = ids
    return find(input_ids, mm_token_id)
