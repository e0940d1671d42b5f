"""The mask of every plan, in FlashAttention-4's language: a row sees a key if the key's position is below its bound."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute


@cute.jit
def below_bound(batch: Any, head: Any, row: Any, key: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
    """Whether kv_pos[key] < q_stop[head, row]. FlashAttention-4 calls it as `mask_mod`, each index a vector of one.

    aux_tensors: q_stop int32 [kv_heads, rows] and kv_pos int32 [keys].
    """
    q_stop, kv_pos = aux_tensors
    bound = cute.make_rmem_tensor(1, q_stop.element_type)
    bound[0] = q_stop[head[0], row[0]]
    position = cute.make_rmem_tensor(1, kv_pos.element_type)
    position[0] = kv_pos[key[0]]
    return position.load() < bound.load()
