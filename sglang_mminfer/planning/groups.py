"""The rows of one class by which of their keys they see whole. Nothing here depends on the chunk, so what is found is
kept with the map and serves all chunks, layers and turns of its request."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_mminfer.modality.runs import Bools, Ints, Runs
from sglang_mminfer.modality.segments import ModalityMap
from sglang_mminfer.patterns.boundary import RowClass
from sglang_mminfer.patterns.index import PairIndex, Scope
from sglang_mminfer.planning.row_loops import RunTable, Wanted, first_runs

NO_KEYS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class RowGroups:
    """Rows of one class in the whole map.

    pairs, wanted: what the class wants of each of its key classes. rows: those of each group, `first_runs` of them, and
    int64 [groups], the most rows of a query tile; one object for all classes that have the same. sees_whole: bool
    [groups, pairs]. keys: those of each pair's class. columns, column_first: int64, the columns of all pairs, those of
    pair p from column_first[p] to
    column_first[p + 1] - 1. estimates: whether a pair is estimated.
    """

    pairs: tuple[PairIndex, ...]
    wanted: Wanted
    rows: tuple[RunTable, NDArray[np.int32], Ints]
    sees_whole: Bools
    keys: RunTable
    columns: Ints
    column_first: Ints
    estimates: bool

    @classmethod
    def of(cls, modality_map: ModalityMap, row_class: RowClass, dense_below: int, block_q: int) -> RowGroups:
        """Made once for each map. Rows before `dense_below` see everything."""
        name = (row_class, dense_below, block_q)
        groups = modality_map.derived.get(name)
        if groups is None:
            groups = modality_map.derived[name] = cls._made(modality_map, *name)
        return groups

    @classmethod
    def _made(cls, modality_map: ModalityMap, row_class: RowClass, dense_below: int, block_q: int) -> RowGroups:
        length = modality_map.length
        scopes = [Scope(modality_map, length, row_class.rows, keys, row_class.text_rule) for keys, _ in row_class.pairs]
        pairs = tuple(pattern.index(scope) for scope, (_, pattern) in zip(scopes, row_class.pairs))
        members = scopes[0].row_members
        groups: list[tuple[tuple[bool, ...], Runs]] = [((), members.clip(dense_below, length))]
        for index in pairs:
            whole = index.whole_rows
            if whole is None:
                groups = [((*sees_whole, False), rows) for sees_whole, rows in groups]
            else:
                groups = [
                    part
                    for sees_whole, rows in groups
                    for part in (((*sees_whole, False), rows - whole), ((*sees_whole, True), rows & whole))
                ]
        every = (True,) * len(pairs)
        seeing_all = next((rows for sees_whole, rows in groups if sees_whole == every), Runs([], []))
        groups = [group for group in groups if group[0] != every]
        groups.append((every, members.clip(0, dense_below) | seeing_all))
        for index in pairs:
            if index.columns is not None:
                (index.columns,) = _shared(modality_map, index.columns) if len(index.columns) else (None,)
        wanted = Wanted(
            np.array([index.sink for index in pairs]),
            np.array([index.local for index in pairs]),
            np.array([index.keys_of_one_more_tile(length) for index in pairs]),
            np.array([index.lines is not None for index in pairs]),
            np.array([index.estimated is not None and not index.local for index in pairs]),
        )
        rows, whole_pairs = run_table([own for _, own in groups]), np.array([sees_whole for sees_whole, _ in groups])
        keys = run_table([scope.key_members for scope in scopes])
        query_rows = np.array([min(block_q, index.query_rows or block_q) for index in pairs])
        most_rows = np.where(whole_pairs, block_q, query_rows).min(axis=1)
        first_run = first_runs(rows, whole_pairs, keys, wanted, most_rows)
        columns = [NO_KEYS if index.columns is None else index.columns for index in pairs]
        return cls(
            pairs=pairs,
            wanted=wanted,
            rows=_shared(modality_map, rows, first_run, most_rows),
            sees_whole=whole_pairs,
            keys=keys,
            columns=columns[0] if len(columns) == 1 else np.concatenate(columns),
            column_first=np.array([0, *accumulate(map(len, columns))]),
            estimates=any(index.estimated is not None for index in pairs),
        )


def _shared(modality_map: ModalityMap, *values: Any) -> Any:
    """Arrays and tuples of arrays that are equal, as one object, so that what follows from them is made once."""
    arrays = [array for value in values for array in (value if isinstance(value, tuple) else (value,))]
    name = ("shared", *((len(array), int(array.sum())) for array in arrays))
    for known, known_arrays in modality_map.derived.setdefault(name, []):
        if all(map(np.array_equal, arrays, known_arrays)):
            return known
    modality_map.derived[name].append((values, arrays))
    return values


def run_table(sets: list[Runs]) -> RunTable:
    """Several sets of positions, one after the other."""
    return RunTable(
        np.concatenate([runs.starts for runs in sets]),
        np.concatenate([runs.stops for runs in sets]),
        np.concatenate([runs.before[:-1] for runs in sets]),
        np.cumsum([0, *(len(runs.starts) for runs in sets)]),
    )
