"""Random conversations, head patterns and paged batches, and the few ways in which tests look at what was visited.

Drawn by hypothesis, so that a failing case shrinks to a small one. `Batch` holds one ragged batch over a paged
cache; whatever no request owns (free pages, the rest of a last page) is NaN, and so is every output before a run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st

from sglang_mminfer import (
    Basis,
    Boundary2D,
    Grid,
    Modality,
    ModalityMap,
    QBoundary,
    Segment,
    SparsePrefillWithPagedKVCacheWrapper,
    VisionGrid,
    pattern_mask,
)
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.reference import masked_attention
from sglang_mminfer.patterns.base import Field, Pattern, fields_of, kinds
from sglang_mminfer.patterns.boundary import patterns_of
from sglang_mminfer.patterns.estimated import Estimated
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner

TEXT, IMAGE, VIDEO, VISION = Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.VISION
REAL = (TEXT, IMAGE, VIDEO)
D = 8  # head dimension of all random batches
SHAPES = [(1, 3), (2, 2), (2, 3), (3, 2), (1, 1)]  # few, so that segments often share one


# ---- conversations -----------------------------------------------------------------------------------------


@st.composite
def segments(draw, start: int, modality: Modality, max_tokens: int = 40) -> Segment:
    """One segment; a video's frames may be apart, separators around them; some have no grid, some no raster."""
    if modality is TEXT or draw(st.integers(0, 9)) == 0:
        return Segment(modality, start, start + draw(st.integers(1, min(20, max_tokens))))
    rows, cols = draw(st.sampled_from(SHAPES))
    frames = 1
    if modality is VIDEO:
        frames = draw(st.integers(1, max(1, min(6, max_tokens // (rows * cols) - 1))))
    gap = draw(st.sampled_from([0, 0, 1, 2])) if frames > 1 else 0
    before, after = draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (2, 1)]))
    starts = [start + before]
    for _ in range(frames - 1):
        starts.append(starts[-1] + rows * cols + (draw(st.integers(0, gap)) if gap else 0))
    raster = rows > 1 or start % 2 == 0  # as good as drawn
    grid = VisionGrid(frames, rows, cols, tuple(starts), raster)
    return Segment(modality, start, starts[-1] + rows * cols + after, grid)


@st.composite
def maps(draw, max_segments: int = 6, max_length: int = 110) -> ModalityMap:
    """A conversation of text, images and videos in any order, at least one token long."""
    out: list[Segment] = []
    position = 0
    for modality in draw(st.lists(st.sampled_from([TEXT, IMAGE, VIDEO, VIDEO]), min_size=1, max_size=max_segments)):
        segment = draw(segments(position, modality))
        if segment.stop > max_length and out:
            break
        out.append(segment)
        position = segment.stop
    return ModalityMap(out)


def conversation(*parts: int | tuple) -> ModalityMap:
    """A map by hand: an int is that many text tokens, (frames, rows, cols[, gap]) a video or, of one frame, an
    image, and a ("image" or "video", tokens) one whose grid nobody knows."""
    out, position = [], 0
    for part in parts:
        if isinstance(part, int):
            segment = Segment(TEXT, position, position + part)
        elif isinstance(part[0], str):
            segment = Segment(Modality(part[0]), position, position + part[1])
        else:
            frames, rows, cols, gap = (*part, 0)[:4]
            starts = tuple(position + i * (rows * cols + gap) for i in range(frames))
            grid = VisionGrid(frames, rows, cols, starts)
            segment = Segment(IMAGE if frames == 1 else VIDEO, position, starts[-1] + grid.cells, grid)
        out.append(segment)
        position = segment.stop
    return ModalityMap(out)


# ---- head patterns -----------------------------------------------------------------------------------------

# Every kind that there is, its fields drawn within their bounds: a new pattern is held to all properties at once.


def values(field: Field, scale: int) -> st.SearchStrategy:
    """What a field may hold; of numbers mostly small ones, so that something lies between the sink and the window."""
    if field.choices:
        return st.sampled_from(field.choices)
    if field.type is float:
        return st.sampled_from([0.001, 0.03, 0.3, 1.0]) | st.floats(0, 1, exclude_min=True)
    if field.least is None:
        return st.booleans()
    return st.integers(field.least, min(field.least + 3, scale)) | st.integers(field.least, scale)


def patterns_of_kind(cls: type[Pattern], scale: int = 20, **fixed: st.SearchStrategy) -> st.SearchStrategy[Pattern]:
    """Patterns of one class. scale: the largest number; fixed: fields that are drawn otherwise."""
    drawn = {field.name: values(field, scale) for field in fields_of(cls)}
    return st.builds(cls, **{**drawn, **fixed})


def growing_of_kind(cls: type[Pattern]) -> st.SearchStrategy[Pattern]:
    """Those of one class that do not look ahead."""
    return patterns_of_kind(cls, **{name: st.just(0) for name in cls.looks_ahead})


def grid(*strides: str) -> st.SearchStrategy[Grid]:
    return patterns_of_kind(Grid, stride=st.sampled_from(strides))  # type: ignore[return-value]


STATIC = {kind: cls for kind, cls in kinds().items() if not issubclass(cls, Estimated)}
growing = st.one_of([growing_of_kind(cls) for cls in STATIC.values()])  # what a row sees depends on nothing after it
static = st.one_of([growing, *(patterns_of_kind(cls) for cls in STATIC.values() if cls.looks_ahead)])
any_pattern = st.one_of([static, *(patterns_of_kind(cls) for kind, cls in kinds().items() if kind not in STATIC)])


def q_boundary(patterns: st.SearchStrategy) -> st.SearchStrategy[QBoundary]:
    return st.one_of(
        st.dictionaries(st.sampled_from(REAL), patterns, min_size=1),
        st.dictionaries(st.sampled_from([TEXT, VISION]), patterns, min_size=1),
    ).map(QBoundary)


@st.composite
def boundary_2d(draw, patterns: st.SearchStrategy) -> Boundary2D:
    """Pairs for each row modality; keys image and video apart, together as vision, or partly not named."""
    pairs = {}
    for rows in draw(st.sampled_from([REAL, REAL, (TEXT, VISION), (VIDEO,)])):
        keys = draw(st.sampled_from([(TEXT, VISION), REAL, (VIDEO,), (VISION,), (TEXT, IMAGE)]))
        for key in keys:
            pairs[rows, key] = draw(patterns)
    return Boundary2D(pairs)


def heads(patterns: st.SearchStrategy = any_pattern) -> st.SearchStrategy:
    """One head: a pattern alone, or several under either boundary."""
    return st.one_of(patterns, patterns, q_boundary(patterns), boundary_2d(patterns))


def is_estimated(head) -> bool:
    return any(isinstance(pattern, Estimated) for pattern in patterns_of(head))


# ---- batches over a paged cache ----------------------------------------------------------------------------


@dataclass
class Batch:
    """One ragged batch: request i has the last `q_lens[i]` of `kv_lens[i]` tokens as rows.

    `heads` has one pattern for each query head. `qs[i]` [q_len, Hq, D], `ks[i]`, `vs[i]` [kv_len, Hkv, D] are
    what each request holds; pages are dealt out in random order among pages that belong to nobody.
    """

    maps: Sequence[ModalityMap]
    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    heads: Sequence
    num_kv_heads: int = 1
    page_size: int = 1
    kv_layout: str = "NHD"
    packed: bool = False
    tiles: tuple[int, int] = (8, 8)
    dense_below: int = 0
    sm_scale: float | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    basis: Basis | None = None
    qs: list[torch.Tensor] = field(default_factory=list)
    ks: list[torch.Tensor] = field(default_factory=list)
    vs: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        hq, hkv = len(self.heads), self.num_kv_heads
        if not self.qs:
            for q_len, kv_len in zip(self.q_lens, self.kv_lens):
                self.qs.append(torch.randn(q_len, hq, D, generator=random).to(self.dtype))
                self.ks.append(torch.randn(kv_len, hkv, D, generator=random).to(self.dtype))
                self.vs.append(torch.randn(kv_len, hkv, D, generator=random).to(self.dtype))
        pages = [-(-n // self.page_size) for n in self.kv_lens]
        self.num_pages = sum(pages) + 3
        self.page_table = torch.randperm(self.num_pages, generator=random)[: sum(pages)].int()
        self.kv_indptr = _indptr(pages)
        self.qo_indptr = _indptr(self.q_lens)
        self.last_page_len = torch.tensor(
            [(n - 1) % self.page_size + 1 if n else 0 for n in self.kv_lens], dtype=torch.int32
        )

    @property
    def group(self) -> int:
        return len(self.heads) // self.num_kv_heads

    @property
    def scale(self) -> float:
        return D**-0.5 if self.sm_scale is None else self.sm_scale

    @property
    def q(self) -> torch.Tensor:
        return torch.cat(self.qs) if self.qs else torch.empty(0, len(self.heads), D)

    def rows(self, request: int) -> slice:
        return slice(int(self.qo_indptr[request]), int(self.qo_indptr[request + 1]))

    def q_start(self, request: int) -> int:
        return self.kv_lens[request] - self.q_lens[request]

    def cache(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        caches = []
        for own in (self.ks, self.vs):
            flat = torch.full(
                (self.num_pages * self.page_size, self.num_kv_heads, D), torch.nan, dtype=own[0].dtype if own else None
            )
            for i, tokens in enumerate(own):
                flat[self.slots(i)] = tokens
            pages = flat.view(self.num_pages, self.page_size, self.num_kv_heads, D)
            caches.append(pages.transpose(1, 2).contiguous() if self.kv_layout == "HND" else pages)
        return torch.stack(caches, dim=1) if self.packed else (caches[0], caches[1])

    def slots(self, request: int) -> torch.Tensor:
        pages = self.page_table[self.kv_indptr[request] : self.kv_indptr[request + 1]].long()
        return (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()[: self.kv_lens[request]]

    def planned(self, backend: str = "torch", heads=None) -> SparsePrefillWithPagedKVCacheWrapper:
        wrapper = SparsePrefillWithPagedKVCacheWrapper(
            None, self.kv_layout, backend, block_q=self.tiles[0], block_k=self.tiles[1]
        )
        wrapper.plan(
            self.qo_indptr,
            self.kv_indptr,
            self.page_table,
            self.last_page_len,
            len(self.heads),
            self.num_kv_heads,
            D,
            self.page_size,
            modality_maps=self.maps,
            head_patterns=self.heads if heads is None else heads,
            sm_scale=self.sm_scale,
            q_data_type=self.q.dtype,
            kv_data_type=self.ks[0].dtype if self.ks else self.q.dtype,
            dense_below=self.dense_below,
            basis=self.basis,
        )
        return wrapper

    def run(self, wrapper: SparsePrefillWithPagedKVCacheWrapper) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        got = wrapper.run(q, self.cache(), out=out, lse=lse, return_lse=True)
        assert got[0] is out and got[1] is lse
        return out, lse

    def exact_mask(self, request: int, head: int) -> torch.Tensor:
        """pattern_mask of one head in one request."""
        q_start, kv_len = self.q_start(request), self.kv_lens[request]
        q, k = self.qs[request][:, head], self.ks[request][:, head // self.group]
        basis = None if self.basis is None else self.basis.of_head(head, len(self.heads))
        whole = self.maps[request], self.heads[head], q_start, kv_len, kv_len
        return pattern_mask(*whole, q, k, sm_scale=self.sm_scale, basis=basis)


def _indptr(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def causal(batch: Batch, request: int) -> torch.Tensor:
    return torch.ones(batch.q_lens[request], batch.kv_lens[request], dtype=torch.bool).tril(batch.q_start(request))


def check(batch: Batch, backend: str) -> None:
    """All that the wrapper promises about one batch, for every request and head."""
    wrapper = batch.planned(backend)
    out, lse = batch.run(wrapper)
    visited_pairs, causal_pairs = torch.zeros(len(batch.heads), dtype=torch.float64), 0
    for i in range(len(batch.maps)):
        causal_pairs += int(causal(batch, i).sum())
        for h in range(len(batch.heads)):
            visited = wrapper.visited_mask(i, h)
            assert visited.shape == (batch.q_lens[i], batch.kv_lens[i])
            visited_pairs[h] += visited.sum()
            missed = batch.exact_mask(i, h) & ~visited
            assert not missed.any(), (
                f"{batch.heads[h]} wants keys that are not visited: {missed.nonzero()[:5].tolist()}"
            )
            assert not (visited & ~causal(batch, i)).any(), "a row visits a key that comes after it"
            below = max(0, batch.dense_below - batch.q_start(i))
            assert torch.equal(visited[:below], causal(batch, i)[:below]), "a row below dense_below is not dense"
            kv = h // batch.group
            exact = masked_attention(batch.qs[i][:, h], batch.ks[i][:, kv], batch.vs[i][:, kv], visited, batch.scale)
            within = {torch.float32: (2e-5, 5e-6), torch.float16: (3e-3, 3e-3)}[batch.dtype]
            got, expected = (out[batch.rows(i), h].float(), lse[batch.rows(i), h]), (exact[0].float(), exact[1].float())
            torch.testing.assert_close(got, expected, rtol=within[0], atol=within[1])
    density = visited_pairs / causal_pairs if causal_pairs else torch.ones(len(batch.heads), dtype=torch.float64)
    torch.testing.assert_close(wrapper.density, density, rtol=1e-12, atol=0)


# Triton's interpreter runs the GPU kernel on a CPU, slowly; `make test` runs these tests once more with it alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXECUTORS = ["triton"] if INTERPRETED else ["torch", "reference"]


def examples(number: int) -> int:
    """How many cases to draw: fewer of them where each takes long."""
    return max(4, number // 8) if INTERPRETED else number


@st.composite
def bases(draw, num_heads: int, num_kv_heads: int) -> Basis | None:
    """Any low-rank forms of q . k, for KV heads or for query heads; or none."""
    number, rank = draw(st.sampled_from([0, num_kv_heads, num_heads])), draw(st.integers(1, D))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return Basis(*torch.randn(2, number, rank, D, generator=random)) if number else None


tile_sizes = st.tuples(st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]))


@st.composite
def batches(draw, patterns: st.SearchStrategy = any_pattern, max_requests: int = 3, max_length: int = 80) -> Batch:
    """Batches of everything: requests with cached prefixes or without rows, page tables, head layouts, tiles."""
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (2, 3), (1, 8), (3, 1)]))
    maps_, q_lens, kv_lens = [], [], []
    for _ in range(draw(st.integers(1, max_requests))):
        conversation_ = draw(maps(max_length=max_length))
        kv_len = draw(st.one_of(st.just(conversation_.length), st.integers(1, conversation_.length)))
        maps_.append(conversation_)
        kv_lens.append(kv_len)
        q_lens.append(draw(st.one_of(st.just(kv_len), st.integers(0, kv_len))))
    return Batch(
        maps_,
        q_lens,
        kv_lens,
        draw(st.lists(heads(patterns), min_size=num_kv_heads * group, max_size=num_kv_heads * group)),
        num_kv_heads,
        draw(st.sampled_from([1, 1, 4, 7, 16])),
        draw(st.sampled_from(["NHD", "HND"])),
        draw(st.booleans()),
        draw(tile_sizes),
        draw(st.sampled_from([0, 0, 0, 10])),
        draw(st.sampled_from([None, None, 0.1, 1.0])),
        draw(st.integers(0, 2**16)),
        basis=draw(bases(num_kv_heads * group, num_kv_heads)),
    )


def alone(
    conversation_: ModalityMap, head, start: int = 0, stop: int | None = None, tiles=(8, 8), dense_below: int = 0
) -> Batch:
    """One request with one head whose rows are [start, stop)."""
    stop = conversation_.length if stop is None else stop
    return Batch([conversation_], [stop - start], [stop], [head], tiles=tiles, dense_below=dense_below)


def cut_out(batch: Batch, request: int, start: int, stop: int, **changes) -> Batch:
    """One request of a one-shot batch as a chunk of its own: rows [start, stop) over keys [0, stop)."""
    assert batch.q_start(request) == 0
    return replace(
        batch,
        **{
            "maps": [batch.maps[request]],
            "q_lens": [stop - start],
            "kv_lens": [stop],
            "qs": [batch.qs[request][start:stop]],
            "ks": [batch.ks[request][:stop]],
            "vs": [batch.vs[request][:stop]],
            **changes,
        },
    )


def cut(batch: Batch, start: int, stop: int, **changes) -> Batch:
    """The only request of a one-shot batch as `cut_out` gives it, over another page table."""
    return cut_out(batch, 0, start, stop, **{"seed": batch.seed + start + 1, **changes})


def visited(batch: Batch, request: int) -> list[torch.Tensor]:
    """bool [rows, keys] for each head: what one request of the batch visits."""
    wrapper = batch.planned()
    batch.run(wrapper)
    return [wrapper.visited_mask(request, h) for h in range(len(batch.heads))]


@st.composite
def whole_prompts(draw, patterns, max_length: int = 110, sm_scales=(None,), with_basis: bool = False) -> Batch:
    """One conversation prefilled in one piece, by one to three heads."""
    chat, group = draw(maps(max_segments=8, max_length=max_length)), draw(st.sampled_from([1, 1, 2, 3]))
    return Batch(
        [chat],
        [chat.length],
        [chat.length],
        draw(st.lists(patterns, min_size=group, max_size=group)),
        tiles=draw(tile_sizes),
        dense_below=draw(st.sampled_from([0, 0, 12])),
        seed=draw(st.integers(0, 999)),
        sm_scale=draw(st.sampled_from(sm_scales)),
        basis=draw(bases(group, 1)) if with_basis else None,
    )


# ---- plans -------------------------------------------------------------------------------------------------


def part_of_plan(plan: BlockPlan, keep: torch.Tensor) -> BlockPlan:
    """The plan without some of its visits: `keep` bool [nnz]."""
    tiles = torch.arange(plan.num_tiles, device=keep.device)
    tile = torch.repeat_interleave(tiles, plan.block_indptr.diff())
    number = torch.arange(len(tile), device=keep.device)
    full = number < (plan.block_indptr[:-1] + plan.num_full)[tile]
    gathered = number >= (plan.block_indptr[1:] - plan.num_gathered)[tile]

    def count(visits: torch.Tensor) -> torch.Tensor:
        return torch.bincount(tile[visits], minlength=plan.num_tiles).int()

    return replace(
        plan,
        block_indptr=torch.nn.functional.pad(count(keep).cumsum(0), (1, 0)).int(),
        block_indices=plan.block_indices[: len(tile)][keep],
        num_full=count(keep & full),
        num_gathered=count(keep & gathered),
        excluded_lanes=plan.excluded_lanes[: int(gathered.sum())][keep[gathered]],
        gathered_start=None,
        known_sizes=None,
    )


def halves(plan: BlockPlan, seed: int = 0) -> list[BlockPlan]:
    """Two plans that share the visits of one, each visit in one of them by chance."""
    random = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, 2, (int(plan.block_indptr[-1]),), generator=random).to(plan.q_rows.device)
    return [part_of_plan(plan, owner == half) for half in range(2)]


def joined(passes: Sequence[BlockPlan]) -> BlockPlan:
    """One plan of several passes from plans of one pass each, over one table of keys."""
    first = passes[0]

    def cat(name: str) -> torch.Tensor:
        return torch.cat([getattr(p, name) for p in passes])

    def indptr(name: str) -> torch.Tensor:
        counts = torch.cat([getattr(p, name).diff() for p in passes])
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()

    groups = list(dict.fromkeys(group for p in passes for group in p.head_groups))
    numbers = [torch.tensor([groups.index(group) for group in p.head_groups]) for p in passes]
    tiles = torch.tensor([p.num_tiles for p in passes])
    return replace(
        first,
        **{name: cat(name) for name in ("q_rows", "q_stop", "num_full", "num_gathered")},
        q_indptr=indptr("q_indptr"),
        block_indptr=indptr("block_indptr"),
        q_heads=torch.cat([n[p.q_heads.long()] for n, p in zip(numbers, passes)]).int(),
        block_indices=torch.cat([p.block_indices[: int(p.block_indptr[-1])] for p in passes]),
        excluded_lanes=torch.cat([p.excluded_lanes[: int(p.num_gathered.sum())] for p in passes]),
        head_groups=tuple(groups),
        pass_indptr=(0, *tiles.cumsum(0).tolist()),
        gathered_start=None,
        known_sizes=None,
    )


def chunks_of(batch: Batch) -> list[RequestChunk]:
    return [
        RequestChunk(batch.maps[i], batch.q_start(i), batch.kv_lens[i], batch.rows(i).start, batch.slots(i))
        for i in range(len(batch.maps))
        if batch.q_lens[i]
    ]


def planner_of(batch: Batch, chunks: list[RequestChunk] | None = None) -> BatchPlanner:
    block_q, block_k = batch.tiles
    chunks = chunks_of(batch) if chunks is None else chunks
    return BatchPlanner(chunks, sum(batch.q_lens), dense_below=batch.dense_below, block_q=block_q, block_k=block_k)
