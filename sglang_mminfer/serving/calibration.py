"""The basis of a rank's heads from the built-in clip: made in the scheduler while it computes the clip densely."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_mminfer.head_config import HeadConfigError, ModelBasis, Provenance, fingerprint_of
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.basis import Basis
from sglang_mminfer.serving import basis_cache, prompts
from sglang_mminfer.serving.basis_cache import Part
from sglang_mminfer.serving.clip_sender import CLIP_RID, NO_CLIP_RID
from sglang_mminfer.serving.moments import Moments
from sglang_mminfer.serving.observe import LayerView
from sglang_mminfer.serving.trace import PrefillRecord

logger = logging.getLogger(__name__)

NOTE = "Made of the built-in clip, which a server computes densely at its start. How it fits other input is not told."


@dataclass(frozen=True)
class Place:
    """A rank of a server, and its part of the model.

    Attributes:
        server_args, hf_config: SGLang's ServerArgs, and the model's transformers config.
        rank, ranks: this rank of the attention's tensor parallelism, and their number.
        layers: [start, stop) of the layers of this pipeline stage.
        stages: pipeline stages.
    """

    server_args: Any
    hf_config: Any
    rank: int
    ranks: int
    layers: tuple[int, int]
    stages: int


class Calibration:
    """The observer that waits for the clip, or for the word that none will come.

    Args:
        rank: of the basis.
        rule: how most heads choose by it; None: none does without a boundary, so the basis has no shares.
        done: called once, with the basis of each layer, or with None if there is none.
        keep: called after that with the same bases, to keep them for later starts.
    """

    def __init__(
        self,
        rank: int,
        rule: Adaptive | None,
        done: Callable[[Mapping[int, Basis] | None], None],
        keep: Callable[[Mapping[int, Basis]], None],
    ) -> None:
        self._rank, self._rule, self._tell, self._keep = rank, rule, done, keep
        self._rid, self._moments, self._complete, self._failed = "", Moments(rule=rule), False, False

    def layer(self, view: LayerView) -> None:
        """Adds the clip's rows of one layer."""
        for request in view.requests:
            if not request.rid.startswith(CLIP_RID):
                continue
            if request.rid != self._rid:  # another size of the clip: what came of the one before does not count
                self._rid, self._moments, self._failed = request.rid, Moments(rule=self._rule), False
            self._complete = request.seq_len >= request.prompt_stop
            try:
                self._moments.add(view, request)
            except Exception:
                self._failed = True
                raise

    def batch_done(self, records: Sequence[PrefillRecord]) -> None:
        """Makes the basis when the clip is complete."""
        for record in records:
            if record.rid.startswith(NO_CLIP_RID):
                return self._tell(None)
            if record.rid.startswith(CLIP_RID) and self._is_complete(record):
                return self._make()
        return None

    def _is_complete(self, record: PrefillRecord) -> bool:
        if self._moments.layers:
            return self._complete
        length = prompts.length_of(record.rid)  # no layer of this server shows its keys
        return length is None or record.seq_len >= length

    def _make(self) -> None:
        moments, self._moments = self._moments, Moments()
        bases: dict[int, Basis] = {}
        try:
            if not self._failed:
                bases = {number: layer.basis(self._rank) for number, layer in moments.layers.items()}
                bases = {number: moments.with_shares(number, basis) for number, basis in bases.items()}
        finally:
            self._tell(bases or None)  # without shares if only these failed
        if bases:
            self._keep(bases)


def keep(place: Place, rank: int, bases: Mapping[int, Basis], rule: Adaptive | None = None) -> None:
    """Keeps a rank's bases for later starts of the same server. Errors are logged: nothing depends on it."""
    try:
        entry = basis_cache.entry_of(place.server_args, place.hf_config, rank, rule)
        if entry is not None and (path := entry.save(*as_part(place, bases, rule))):
            logger.info("mminfer: the basis is kept for later starts: %s", path)
    except (OSError, HeadConfigError) as error:
        logger.warning("mminfer: the basis is not kept, so the next start makes it anew: %s", error)


def as_part(place: Place, bases: Mapping[int, Basis], rule: Adaptive | None = None) -> tuple[ModelBasis, Part]:
    """A rank's bases in the shape of the whole model, with 0 elsewhere, and which part of it they are.

    Args:
        rule: how heads choose that visit the shares of the bases.
    """
    model = fingerprint_of(place.hf_config)
    count = model.heads // place.ranks
    forms = len(next(iter(bases.values())).queries)
    # Ranks that share a KV head have a form each for it, so all query heads have their own then.
    of_kv_heads = forms * place.ranks == model.kv_heads
    own = forms if of_kv_heads else count
    rank, dim = next(iter(bases.values())).queries.shape[1:]
    whole = torch.zeros(2, model.layers, own * place.ranks, rank, dim)
    for number, basis in bases.items():
        both = torch.stack([basis.queries, basis.keys]).repeat_interleave(own // forms, dim=1)
        whole[:, number, place.rank * own : (place.rank + 1) * own] = both
    today = datetime.date.today().isoformat()
    how = Provenance("calibration", NOTE, calibration="built-in clip", date=today)
    heads = place.rank * count, (place.rank + 1) * count
    layout = f"tp{place.ranks}.pp{place.stages}"
    part = Part(place.layers, heads, model.layers, model.heads, layout)
    found = ModelBasis(model, how, *whole)
    if rule is not None:
        all_shares = torch.zeros(model.layers, model.heads)
        for number, basis in bases.items():
            all_shares[number, slice(*heads)] = math.nan if basis.shares is None else basis.shares
        found = found.with_shares(all_shares, rule)
    return found, part


def own_shares(place: Place, bases: Mapping[int, Basis]) -> torch.Tensor:
    """float32 [layers, query heads of this rank]: `Basis.shares` of all layers, NaN where they are not known."""
    model = fingerprint_of(place.hf_config)
    shares = torch.full((model.layers, model.heads // place.ranks), math.nan)
    for number, basis in bases.items():
        if basis.shares is not None:
            shares[number] = basis.shares
    return shares


def shares_of_all_ranks(place: Place, bases: Mapping[int, Basis]) -> torch.Tensor:
    """float32 [layers, query heads of the model]: the same of all tensor-parallel ranks, so that they decide alike. All
    of them must call this in the same batch, whatever happened to their bases; they wait for each other."""
    own = own_shares(place, bases)
    if place.ranks == 1:
        return own
    from sglang.srt.runtime_context import get_parallel

    return torch.cat(get_parallel().attn_tp_group.all_gather_object(own), dim=1)
