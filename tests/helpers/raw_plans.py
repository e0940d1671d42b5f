"""Plans of no pattern at all, and what each of their rows and heads sees by the two conditions of the contract."""

import torch
from hypothesis import strategies as st

from sglang_mminfer.kernels.block_plan import PAD_POSITION, BlockPlan, KeyTable, pack_lanes
from support import joined

BLOCK_K, SLOTS = 4, 50


@st.composite
def raw_tiles(draw, num_rows: int, num_tiles: int):
    """(rows, bounds, key tiles) of some query tiles in any order, each row at most once."""
    left, tiles = list(draw(st.permutations(range(num_rows)))), []
    while left and draw(st.integers(0, 4)):
        size = draw(st.integers(1, 4))
        rows, left = left[:size], left[size:]
        listed = draw(st.sets(st.integers(0, num_tiles - 1)))
        tiles.append((rows, [draw(st.integers(0, 31)) for _ in rows], listed))
    return tiles


@st.composite
def almost_causal_tiles(draw, num_rows: int):
    """Row after row and key after key, as in dense attention; then at most one thing is not as it was."""
    start, prefix, tiles = draw(st.integers(0, num_rows - 1)), draw(st.integers(0, 9)), []
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    for size in sizes:
        rows = list(range(start, min(start + size, num_rows)))
        if rows:
            bounds = [prefix + row + 1 for row in rows]
            tiles.append((rows, bounds, set(range(-(-bounds[-1] // BLOCK_K)))))
        start += size
    odd = draw(st.integers(0, len(tiles) - 1))
    rows, bounds, listed = tiles[odd]
    i = draw(st.integers(0, len(rows) - 1))
    change = draw(st.sampled_from(["nothing", "bound", "rows", "keys", "no keys"]))
    if change == "bound":
        bounds[i] = draw(st.integers(0, 31))
    elif change == "rows":
        rows[0], rows[i] = rows[i], rows[0]
    elif change == "keys":
        listed.discard(draw(st.integers(0, 3)))
    elif change == "no keys":
        listed.clear()
    return tiles


@st.composite
def raw_plans(draw):
    """Plans of no pattern at all: any positions, slots, bounds, lists and excluded lanes that the contract allows."""
    groups = ((0, 1, 2, 3), (1, 2), (3,), (0, 2, 3))
    causal = draw(st.booleans())
    num_tiles, num_rows, passes = 6 if causal else draw(st.integers(1, 6)), draw(st.integers(1, 9)), []
    positions, slots = [], []
    for tile in range(num_tiles):
        for lane in range(BLOCK_K):
            padding = draw(st.integers(0, 40 if causal else 5)) == 0
            position = tile * BLOCK_K + lane if causal else draw(st.integers(0, 30))
            positions.append(PAD_POSITION if padding else position)
            slots.append(0 if padding else draw(st.integers(0, SLOTS - 1)))
    keys = KeyTable(*(torch.tensor(x, dtype=torch.int32) for x in (positions, slots)))
    for _ in range(draw(st.integers(1, 3))):
        plan = {"q_rows": [], "q_stop": [], "q_indptr": [0], "q_heads": [], "block_indptr": [0]}
        block_indices, num_full, num_gathered, excluded = [], [], [], []
        for group in draw(st.sampled_from([(0,), (1, 2), (3,)])):  # groups that share no head
            tiles = draw(almost_causal_tiles(num_rows) if causal else raw_tiles(num_rows, num_tiles))
            for rows, stops, listed in tiles:
                listed = sorted(listed)
                gathered = [b for b in listed if not causal and draw(st.booleans())]
                full = [
                    b
                    for b in listed
                    if b not in gathered and all(p < min(stops) for p in positions[b * BLOCK_K : (b + 1) * BLOCK_K])
                ]
                plan["q_rows"] += rows
                plan["q_stop"] += stops
                plan["q_indptr"].append(len(plan["q_rows"]))
                plan["q_heads"].append(group)
                block_indices += full + [b for b in listed if b not in full + gathered] + gathered
                num_full.append(len(full))
                num_gathered.append(len(gathered))
                excluded += [[draw(st.booleans()) for _ in range(BLOCK_K)] for _ in gathered]
                plan["block_indptr"].append(len(block_indices))
        spare = draw(st.integers(0, 2))  # room that no tile uses
        arrays = {name: torch.tensor(x, dtype=torch.int32) for name, x in plan.items()}
        passes.append(
            BlockPlan(
                keys=keys,
                **arrays,
                block_indices=torch.tensor(block_indices + [999] * spare, dtype=torch.int32),
                num_full=torch.tensor(num_full, dtype=torch.int32),
                num_gathered=torch.tensor(num_gathered, dtype=torch.int32),
                excluded_lanes=pack_lanes(torch.tensor(excluded + [[True] * BLOCK_K] * spare).view(-1, BLOCK_K)),
                head_groups=groups,
                num_rows=num_rows,
                num_heads=4,
                block_q=num_rows,
                block_k=BLOCK_K,
            )
        )
    return joined(passes)


def counted_slots(plan: BlockPlan, row: int, head: int) -> list[int]:
    """The cache rows that count for one row and head, by the two conditions of the contract."""
    out = []
    keys = plan.keys
    for t in range(plan.num_tiles):
        if head not in plan.head_groups[plan.q_heads[t]]:
            continue
        a, b = plan.block_indptr[t : t + 2].tolist()
        listed = plan.block_indices[a:b].tolist()
        first_gathered, first = (
            len(listed) - int(plan.num_gathered[t]),
            int(plan.num_gathered[:t].sum()),
        )
        for i in range(*plan.q_indptr[t : t + 2].tolist()):
            if plan.q_rows[i] != row:
                continue
            for j, block in enumerate(listed):
                for lane in range(BLOCK_K):
                    key = block * BLOCK_K + lane
                    if j >= first_gathered:
                        word = int(plan.excluded_lanes[first + j - first_gathered, lane // 32])
                        if word >> (lane % 32) & 1:
                            continue
                    if keys.kv_pos[key] < plan.q_stop[i]:
                        out.append(int(keys.kv_slots[key]))
    return out
