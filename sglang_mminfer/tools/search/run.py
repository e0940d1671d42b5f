"""`mminfer search`: from a model and calibration conversations to a head config and a report on it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from sglang_mminfer.head_config import Defaults, HeadConfig, ModelBasis, ModelFingerprint, Provenance
from sglang_mminfer.head_config.basis_file import ENDING
from sglang_mminfer.modality.segments import Modality, ModalityMap
from sglang_mminfer.patterns.a_shape import AShape
from sglang_mminfer.patterns.boundary import HeadPattern
from sglang_mminfer.patterns.dense import Dense
from sglang_mminfer.patterns.grid import Grid
from sglang_mminfer.patterns.ladder import RANKS
from sglang_mminfer.patterns.tri_shape import TriShape
from sglang_mminfer.tools.basis.observer import default_rule
from sglang_mminfer.tools.errors import Failed
from sglang_mminfer.tools.search import job as jobs
from sglang_mminfer.tools.search import tile_times
from sglang_mminfer.tools.search.allocate import Allocation, Table, equal_budget, frontier, within_density, within_error
from sglang_mminfer.tools.search.candidates import DENSE, Phases, candidates
from sglang_mminfer.tools.search.measure import MODALITIES
from sglang_mminfer.tools.search.tile_times import TileTimes
from sglang_mminfer.tools.server import Server, ServerError

Say = Callable[[str], None]
Messages = list[dict[str, Any]]

SERVER_FLAGS = (
    *("--attention-backend", "mminfer", "--mminfer-config", "dense"),
    *("--chunked-prefill-size", "-1", "--disable-radix-cache", "--max-running-requests", "1"),
    *("--skip-server-warmup", "--sleep-on-idle"),
    *("--watchdog-timeout", "86400"),  # one forward pass measures all candidates; SGLang ends a server after 5 minutes
)
"""The server answers densely and prefills every prompt in one chunk; the search looks into every layer beside that."""


class SearchError(Failed):
    """The search cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Calibration:
    """A conversation as OpenAI messages, and the name of its results."""

    name: str
    messages: Messages

    @staticmethod
    def of_video(path: Path, question: str = "What happens in this video?") -> Calibration:
        """One message with a video and a question."""
        url = str(path.resolve())
        content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}]
        return Calibration._named(path.stem, [{"role": "user", "content": content}])

    @staticmethod
    def of_file(path: Path) -> Calibration:
        """The conversation of a JSON file with a list of messages.

        Raises:
            SearchError: there is no such file, or it holds something else.
        """
        try:
            messages = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SearchError(f"{path}: expected a JSON file with a list of OpenAI messages: {error}") from None
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise SearchError(f"{path}: expected a list of OpenAI messages, each with a role")
        return Calibration._named(path.stem, messages)

    @staticmethod
    def _named(stem: str, messages: Messages) -> Calibration:
        digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:10]
        return Calibration(f"{stem}-{digest}", messages)


@dataclass(frozen=True)
class Scores:
    """Measurements of configs on one or more prompts: C configs, L layers, H heads, M modalities, K kinds of visits.

    names:   [C].
    error:   [C, L, H, M], NaN if no prompt has rows of the modality.
    visited: [C, L, H, M], (row, key) pairs.
    visits:  [C, L, H, M, K], visits of tiles by `tile_times.KINDS`.
    causal:  [M], (row, key) pairs of one head at or below the diagonal.
    ms:      [C, L].
    """

    names: list[str]
    error: np.ndarray
    visited: np.ndarray
    visits: np.ndarray
    causal: np.ndarray
    ms: np.ndarray

    def density(self, config: int) -> float:
        """Visited over causal pairs of one config, mean over all heads."""
        return float(self.visited[config].sum(axis=-1).mean() / self.causal.sum())

    def first(self, count: int) -> Scores:
        """The measurements of the first `count` configs."""
        return replace(
            self,
            names=self.names[:count],
            error=self.error[:count],
            visited=self.visited[:count],
            visits=self.visits[:count],
            ms=self.ms[:count],
        )

    def time(self, times: TileTimes) -> np.ndarray:
        """[C, L, H, M]: the time of the visits, as a share of the time of a whole head of the config `DENSE`."""
        spent = self.visits @ times.by_kind
        return spent / spent[self.names.index(DENSE)].sum(axis=-1).mean()

    def mean_error(self, config: int) -> float:
        """The error of one config, summed over modalities, mean over all heads."""
        return float(np.nansum(self.error[config], axis=-1).mean())


class Prober:
    """Asks a server in search mode. The first question starts the server; results in the folder are not asked for.

    Whatever it gives by layer has those with attention only, in their order.
    """

    def __init__(
        self, server: Server, folder: Path, model: ModelFingerprint, say: Say, max_memory: int | None = None
    ) -> None:
        self.server, self.folder, self.say = server, folder, say
        self.layers = model.attention_layers
        self.max_memory = max_memory

    def _started(self) -> Server:
        if not self.server.running:
            self.say("the server starts")
            try:
                self.server.start()
            except ServerError as error:
                raise SearchError(str(error)) from None
        return self.server

    def ask(self, job: jobs.Job, calibration: Calibration) -> list[list[dict[str, Any]]]:
        """[layers][ranks] results of a job.

        Raises:
            SearchError: the prompt has no media, did not run in one chunk, or breaks the memory limit.
        """
        results = jobs.load(self.folder, job.result, self.layers)
        if not all(results):
            server = self._started()
            self.say(
                f"{calibration.name}: {job.stage} ({max(len(job.candidates), 1)} to do in {len(self.layers)} layers)"
            )
            jobs.write(self.folder, job)
            self._prefill(server, calibration)
            results = jobs.load(self.folder, job.result, self.layers)
            if reason := jobs.refused(self.folder, job.result, results):
                raise SearchError(f"{calibration.name}: {reason}")
        if missing := [layer for layer, ranks in zip(self.layers, results) if not ranks]:
            raise SearchError(
                f"{calibration.name}: nothing was measured in layers {missing[:8]}: expected a prompt with an image or "
                f"a video of known geometry, computed in one piece; the server's log is {self.server.log_path}"
            )
        return results

    def _prefill(self, server: Server, calibration: Calibration) -> None:
        import openai

        try:
            server.client(timeout=24 * 3600).chat.completions.create(
                model=server.model,
                messages=calibration.messages,
                max_tokens=1,
                temperature=0,
            )
        except openai.APIError as error:
            raise SearchError(f"{calibration.name}: the server refused it: {error}") from None

    def _first_look(self, calibration: Calibration) -> list[list[dict[str, Any]]]:
        return self.ask(jobs.Job("phases", self._first_result(calibration), max_memory=self.max_memory), calibration)

    @staticmethod
    def _first_result(calibration: Calibration) -> str:
        return f"{calibration.name}-phases-{jobs.FORMAT}"

    def phases(self, calibration: Calibration) -> tuple[ModalityMap, list[list[Phases]]]:
        """The map of the prompt, and the phases of each head, [layers][heads]. Errors: as `ask`."""
        results = self._first_look(calibration)
        heads = [[of_head for rank in ranks for of_head in rank["phases"]] for ranks in results]
        return jobs.map_from_json(results[0][0]["map"]), heads

    def tile_times(self, calibrations: Sequence[Calibration]) -> TileTimes:
        """The tile times in the folder. If it has none, those of the first looks are agreed on and written there."""
        path = self.folder / tile_times.FILE
        if not path.exists():
            ranks = [rank for calibration in calibrations for ranks in self._first_look(calibration) for rank in ranks]
            times = tile_times.agreed([rank["tile_us"] for rank in ranks], ranks[0]["executor"])
            path.write_bytes(msgspec.json.encode(times))
        return read_times(path)

    def basis(self, calibrations: Sequence[Calibration], model: ModelFingerprint, note: Provenance) -> ModelBasis:
        """The basis of the model's heads by the calibration prompts, which count alike. Errors: as `ask`."""
        q_moments, k_moments = (self._moments(calibrations, name) for name in ("q", "k"))
        # Where there are more ranks than KV heads, several ranks hold the same one.
        k_moments = k_moments[:, :: k_moments.shape[1] // model.kv_heads]
        shares = self._moments(calibrations, "shares").float()
        q_moments, k_moments, shares = (_in_all_layers(part, model) for part in (q_moments, k_moments, shares))
        basis = ModelBasis.of_moments(model, note, q_moments, k_moments, max(_ranks(model)))
        return basis.with_shares(shares, default_rule())

    def _moments(self, calibrations: Sequence[Calibration], name: str) -> torch.Tensor:
        """float64 [layers, heads, D, D], or [layers, heads] for the shares: the means over the prompts."""
        for calibration in calibrations:
            self._first_look(calibration)
        layers = []
        for layer in self.layers:
            of_prompts = [jobs.load_array(self.folder, self._first_result(c), layer, name) for c in calibrations]
            layers.append(np.mean(of_prompts, axis=0, dtype=np.float64))
        return torch.from_numpy(np.stack(layers))

    def scores(
        self, calibration: Calibration, configs: list[tuple[str, str]], basis: ModelBasis | None = None
    ) -> Scores:
        """The measurements of configs, given as (name, head config as JSON text), on one prompt. Errors: as `ask`.

        Args:
            basis: for configs that choose keys by it.
        """
        file = None
        if basis is not None:
            source = json.dumps([jobs.FORMAT, basis.provenance.calibration, basis.rank])
            file = f"{hashlib.sha256(source.encode()).hexdigest()[:10]}{ENDING}"
            if not (self.folder / file).exists():
                basis.save(self.folder / file)
        digest = hashlib.sha256(json.dumps([jobs.FORMAT, configs, file]).encode()).hexdigest()[:10]
        job = jobs.Job("measure", f"{calibration.name}-{digest}", configs, self.max_memory, file)
        results = self.ask(job, calibration)

        def table(name: str) -> np.ndarray:
            """[C, L, H, ...]: the layers' results, with the heads of the ranks in order."""
            layers = [
                np.concatenate([np.array(rank[name], dtype=float) for rank in ranks], axis=1) for ranks in results
            ]
            return np.stack(layers, axis=1)

        ms = np.array([np.max([rank["ms"] for rank in ranks], axis=0) for ranks in results]).T
        names, causal = [name for name, _ in configs], np.array(results[0][0]["causal"])
        return Scores(names, table("error"), table("visited"), table("visits"), causal, ms)


def _in_all_layers(of_attention: torch.Tensor, model: ModelFingerprint) -> torch.Tensor:
    """[layers, ...], with 0 for layers without attention, from [layers with attention, ...]."""
    whole = of_attention.new_zeros(model.layers, *of_attention.shape[1:])
    whole[list(model.attention_layers)] = of_attention
    return whole


def read_times(path: Path) -> TileTimes:
    """The tile times of a file.

    Raises:
        SearchError: there is no such file, or it holds something else.
    """
    try:
        return tile_times.load(path)
    except (OSError, ValueError) as error:
        raise SearchError(str(error)) from None


def joined(scores: Sequence[Scores]) -> Scores:
    """The scores over several prompts: errors are averaged over the prompts that have the modality; pairs add up."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a modality that no prompt has
        error = np.nanmean([s.error for s in scores], axis=0)
    first = scores[0]
    return Scores(
        first.names,
        error,
        np.sum([s.visited for s in scores], axis=0),
        np.sum([s.visits for s in scores], axis=0),
        np.sum([s.causal for s in scores], axis=0),
        np.sum([s.ms for s in scores], axis=0),
    )


def merged_phases(by_prompt: Sequence[list[list[Phases]]]) -> list[list[Phases]]:
    """[layers][heads] phases that several prompts suggest: the heaviest phase of every prompt, then the second, ..."""
    merged: list[list[Phases]] = []
    for rows in zip(*by_prompt):
        merged.append([])
        for heads in zip(*rows):
            of_head: Phases = {}
            for stride in ("frame", "row"):
                ranked = [phase for rank in zip(*(h[stride] for h in heads)) for phase in rank]
                of_head[stride] = list(dict.fromkeys(ranked))
            merged[-1].append(of_head)
    return merged


def doubts(maps: Sequence[ModalityMap]) -> list[str]:
    """Sentences about what the calibration does not show."""
    sentences = []
    kinds = {segment.modality for modality_map in maps for segment in modality_map.segments}
    frames = sum(
        s.grid.frames for modality_map in maps for s in modality_map.segments if s.grid and s.modality is Modality.VIDEO
    )
    if Modality.VIDEO not in kinds:
        sentences.append("No calibration input has a video: what heads do with frames was not seen.")
    elif frames < 16:
        sentences.append(
            f"The calibration has only {frames} temporal patches of video: lines through frames are short."
        )
    if Modality.IMAGE not in kinds:
        sentences.append("No calibration input has an image: rows of images get what rows of text get.")
    if (longest := max(modality_map.length for modality_map in maps)) < 4096:
        sentences.append(f"The longest calibration input has {longest} tokens: sparsity pays at longer ones.")
    if all(modality_map.segments[-1].stop - modality_map.segments[-1].start < 4 for modality_map in maps):
        sentences.append("No calibration input ends in text: the rows that answer were not seen.")
    return sentences


def baselines(layers: int, heads: int, local: int) -> list[tuple[str, list[list[HeadPattern]]]]:
    """Configs that need no search, for the report."""
    patterns: list[tuple[str, HeadPattern]] = [
        ("a_shape", AShape(128, local)),
        ("tri_shape", TriShape(128, local, 0)),
        ("grid v h s", Grid("frame", True, True, True, 0, 128, local)),
    ]
    return [(name, [[pattern] * heads] * layers) for name, pattern in patterns]


@dataclass
class SearchResult:
    """The result of a search.

    config:      the head config that was searched.
    allocation:  the choices that `config` holds.
    equal:       the choices with an equal budget for each head.
    curve:       (density, error) of many budgets, ascending.
    doubts:      sentences about what the calibration does not show.
    times:       the times of tile visits.
    by_time:     whether errors were weighed against times; else against visited pairs.
    calibration: the measurements of the finalists on the calibration input.
    held_out:    the same on the held-out input; None if there is none.
    """

    config: HeadConfig
    allocation: Allocation
    equal: Allocation
    curve: list[tuple[float, float]]
    doubts: list[str]
    times: TileTimes
    by_time: bool
    calibration: Scores
    held_out: Scores | None

    @property
    def cost_words(self) -> str:
        """A sentence for the report: what errors were weighed against."""
        weighed = "against these times" if self.by_time else "against visited pairs, whatever they take"
        return f"One visit of a tile: {self.times}. Errors were weighed {weighed}."


def search(
    prober: Prober,
    model: ModelFingerprint,
    calibrations: Sequence[Calibration],
    held_out: Calibration | None,
    *,
    density: float | None,
    error: float | None,
    boundaries: Sequence[str],
    times: TileTimes | None,
    by_time: bool,
    dense_below: int,
    name: str,
    today: datetime.date,
) -> SearchResult:
    """Measure the candidates, allocate a pattern to each head, and measure the result.

    Args:
        model: the `ModelFingerprint` of the config.
        density, error: the budget; one of the two is None.
        boundaries: which of `search.BOUNDARIES` a head may have.
        times: the times of tile visits; None: the server measures them.
        by_time: whether a visit costs its time; else every visited pair costs the same.
        dense_below: rows below this position see everything in the config.

    Raises:
        SearchError: nothing fits the budget, or a prompt cannot be measured.
    """
    first_looks = [prober.phases(calibration) for calibration in calibrations]
    maps = [modality_map for modality_map, _ in first_looks]
    longest, unseen = max(maps, key=lambda modality_map: modality_map.length), doubts(maps)
    basis_note = Provenance(
        "search",
        "Low-rank forms of q . k by the second moments of the calibration input.",
        calibration=", ".join(c.name for c in calibrations),
        budget=f"rank {max(_ranks(model))}",
        date=today.isoformat(),
    )
    basis = prober.basis(calibrations, model, basis_note)
    phases = merged_phases([phases for _, phases in first_looks])
    named_candidates = list(candidates(longest, phases, _ranks(model)))
    texts = [(label, jobs.as_config(label, heads, model)) for label, heads in named_candidates]
    patterns = [heads for _, heads in named_candidates]
    default = ("default", _default(model))
    with_default = joined([prober.scores(calibration, [*texts, default], basis) for calibration in calibrations])
    scores = with_default.first(len(named_candidates))
    tile_us = times or prober.tile_times(calibrations)
    time = scores.time(tile_us) if by_time else None
    table = Table(
        patterns,
        scores.error,
        scores.visited,
        scores.causal,
        MODALITIES,
        time,
        group=model.heads // model.kv_heads,
    ).only(boundaries)
    try:
        chosen = within_density(table, density) if density is not None else within_error(table, error or 0.0)
    except ValueError as infeasible:
        raise SearchError(str(infeasible)) from None
    equal = equal_budget(table, density if density is not None else chosen.density)
    budget = f"mean density {density}" if density is not None else f"mean error {error}"
    note = Provenance(
        "search",
        f"Searched among {len(table.patterns)} candidates; errors are of attention outputs on the calibration input.",
        calibration=", ".join(c.name for c in calibrations),
        budget=budget,
        date=today.isoformat(),
        details={
            "tokens": [modality_map.length for modality_map in maps],
            "doubts": unseen,
            "boundaries": list(boundaries),
            "cost": "time" if by_time else "pairs",
            "tile_us": msgspec.to_builtins(tile_us),
        },
    )
    config = HeadConfig(name, note, "layers", model.in_all_layers(chosen.heads), model, Defaults(dense_below))
    if config.basis_rank:
        config = replace(config, basis=basis)
    finalists: list[tuple[str, list[list[HeadPattern]]]] = [
        ("searched", chosen.heads),
        ("equal budget for each head", equal.heads),
        *_as_dense_as(table, {"equal budget": equal.density, "default": with_default.density(len(named_candidates))}),
        *baselines(len(chosen.heads), model.heads, 1024 if longest.length > 4096 else 256),
        (DENSE, [[Dense()] * model.heads] * len(chosen.heads)),
    ]
    texts = [*((label, jobs.as_config(label, heads, model)) for label, heads in finalists), default]
    on_calibration = joined([prober.scores(calibration, texts, basis) for calibration in calibrations])
    on_held_out = prober.scores(held_out, texts, basis) if held_out is not None else None
    return SearchResult(config, chosen, equal, frontier(table), unseen, tile_us, by_time, on_calibration, on_held_out)


def _ranks(model: ModelFingerprint) -> tuple[int, ...]:
    """The ranks of low-rank forms that are tried."""
    return tuple(rank for rank in RANKS if rank <= model.head_dim) or (model.head_dim,)


def _as_dense_as(table: Table, densities: dict[str, float]) -> list[tuple[str, list[list[HeadPattern]]]]:
    """The search's results at the densities of other configs, so that errors compare at equal density."""
    finalists = []
    for whose, density in densities.items():
        with contextlib.suppress(ValueError):  # no choice of candidates is so sparse
            finalists.append((f"searched, as dense as {whose}", within_density(table, density).heads))
    return finalists


def _default(model: ModelFingerprint) -> str:
    default = HeadConfig.load("default")
    heads = [default.patterns(layer, model.heads) for layer in model.attention_layers]
    return jobs.as_config("default", heads, model, default.defaults.dense_below)
