"""An executor on one GPU against dense attention and against other sparse kernels, side by side in one run.

    python -m sglang_mminfer.benchmarks.tile_attention [--executor fa4] [--minutes 7] [--out FILE]
    python -m sglang_mminfer.benchmarks.tile_attention --tune

First the self-check runs several times: a kernel that races is wrong now and then. Then come the cases, the most
important ones first, each with some rows of its answer compared with float64. Dense is torch's cuDNN attention, which
is in FlashAttention-3's class. The result file is written after each case, and a case that is in it is skipped, so the
same command continues a run that was cut short. A case that fails is written with its error and tried again only with
--retry. At the end the program writes a Markdown table, and plots if matplotlib is installed.

--tune times the candidate builds of the Triton kernel instead (`tuning.py`).

`TRITON_INTERPRET=1 ... --tiny` runs very small cases on a CPU. They show that the program works; their times mean
nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from sglang_mminfer.benchmarks import answers, measure, report
from sglang_mminfer.benchmarks import rivals as baselines
from sglang_mminfer.benchmarks.cases import (
    CHOOSING,
    HEAD_DIM,
    LAYERS,
    PATTERNS,
    SEARCHED,
    SHAPES,
    Case,
    cases,
    conversation,
    layers,
    tiny_cases,
)
from sglang_mminfer.benchmarks.inputs import Inputs, make_inputs
from sglang_mminfer.kernels import executors
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.work_items import work_items
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner, is_static
from sglang_mminfer.planning.tiles import BLOCK_K
from sglang_mminfer.serving import self_check
from sglang_mminfer.tools import machine

RESULTS = Path("sglang_mminfer/benchmarks/results")
PAIRS = 128  # of an item of any executor, at this head dim
CHECKS = 5
CHECKED = {"cuda": (14, 2), "cpu": (2, 1)}  # heads of the self-check; on a GPU as many share a KV head as in most cases


class Bench:
    """Measures cases one after the other. Successive cases with the same inputs share tensors and the dense time."""

    def __init__(self, device: str, executor: str, block_k: int) -> None:
        self.device, self.attend, self.block_k = device, executors.EXECUTORS[executor], block_k
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._made_for: tuple[str, int, int, str] | None = None
        self._inputs: Inputs | None = None
        self._dense: dict[str, Any] | None = None

    def check(self) -> self_check.Answer:
        """The self-check of the executor."""
        return self_check.check(self.attend, self.device, self.dtype, HEAD_DIM, *CHECKED[self.device])

    def run(self, case: Case) -> dict[str, Any]:
        """The figures of one case. Times are those of a layer."""
        inputs = self._inputs_of(case)
        planned = _Planned(case, inputs, self.block_k)
        plans = planned.make()
        timing = measure.timed(partial(self._attend, inputs, plans), self.device)
        difference = answers.difference(inputs, plans[-1])
        if not difference.is_within(self.dtype):
            raise ArithmeticError(f"the answer is wrong: {difference}")
        count = planned.count
        figures = {**_work(case, plans, timing.ms / count), **_index(case, plans[0], inputs)}
        figures |= {
            "sparse_least_ms": timing.least / count,
            "sparse_most_ms": timing.most / count,
            "issue_ms": timing.issue_ms / count,
            "repeats": timing.repeats,
            "difference": difference.out,
            "lse_difference": difference.lse,
        }
        if case.against == "dense":
            figures |= self._against_dense(case, inputs, figures)
            figures |= self._planning(planned, inputs, figures)
        else:
            figures |= self._against_other(case, inputs, plans[0], figures["sparse_ms"])
        return {key: _short(value) for key, value in figures.items()}

    def _attend(self, inputs: Inputs, plans: list[BlockPlan]) -> None:
        for plan in plans:
            self.attend(inputs.q, inputs.k_cache, inputs.v_cache, plan, inputs.scale, inputs.out, inputs.lse)

    def _inputs_of(self, case: Case) -> Inputs:
        if self._inputs is None or self._made_for != case.inputs:
            self.free()
            heads = SHAPES[case.shape]
            self._inputs = make_inputs(case.rows, case.tokens, heads, HEAD_DIM, self.dtype, self.device, case.slots)
            self._made_for = case.inputs
        return self._inputs

    def free(self) -> None:
        """Free the tensors."""
        self._inputs = self._dense = self._made_for = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _against_dense(self, case: Case, inputs: Inputs, figures: dict[str, Any]) -> dict[str, Any]:
        if self._dense is None:
            dense = baselines.dense(inputs)
            ms = measure.timed(dense.run, self.device).ms
            self._dense = {"dense_how": dense.how, "dense_ms": ms, "tflops_dense": _tflops(case, 1.0, ms)}
        speedup = self._dense["dense_ms"] / figures["sparse_ms"]
        return {
            **self._dense,
            "speedup": speedup,
            "share_of_ideal": speedup * figures["density"],
            "share_of_dense_throughput": figures["tflops_on_visited_tiles"] / self._dense["tflops_dense"],
        }

    def _planning(self, planned: _Planned, inputs: Inputs, figures: dict[str, Any]) -> dict[str, Any]:
        """What plans cost, and what the host makes of them before they first run."""
        repeats = 3 if self.device == "cuda" else 1
        made = measure.cost(planned.make, self.device, repeats)
        made_and_issued = measure.cost(lambda: self._attend(inputs, planned.make()), self.device, repeats)
        issue_ms = figures["issue_ms"] * planned.count
        prepare_ms = max(0.0, made_and_issued.host_ms - made.host_ms - issue_ms)
        # What a card does for a plan that is made anew for each layer: it chooses keys and spells out the lists.
        plan_ms = {} if planned.layers > 1 else {"plan_device_ms": measure.timed(planned.make, self.device).ms}
        wall_ms, attention_ms = made.wall_ms + prepare_ms, figures["sparse_ms"] * planned.layers
        return {
            **plan_ms,
            "plan_host_ms": made.host_ms + prepare_ms,
            "plan_wall_ms": wall_ms,
            "layers_of_a_plan": planned.layers,
            "plan_share_of_attention": wall_ms / attention_ms,
            "speedup_with_plan": figures["dense_ms"] * planned.layers / (attention_ms + wall_ms),
        }

    def _against_other(self, case: Case, inputs: Inputs, plan: BlockPlan, sparse_ms: float) -> dict[str, Any]:
        other = baselines.AGAINST[case.against](inputs, plan)
        ms = measure.timed(other.run, self.device).ms
        figures = {"other_ms": ms, "speedup_over_other": ms / sparse_ms}
        if other.output is not None:
            ours = inputs.out.float()
            figures["other_difference"] = float((other.output().float() - ours).norm() / ours.norm())
        return figures


class _Planned:
    """Makes the plans of a case as a server does: the map exists already, the rest is new with every forward.

    count:  how many plans `make` makes.
    layers: how many layers share them.
    """

    def __init__(self, case: Case, inputs: Inputs, block_k: int) -> None:
        of_layers = layers(case)
        self._heads = of_layers if case.pattern == SEARCHED else of_layers[:1]
        self.count = len(self._heads)
        self.layers = len(of_layers) if case.pattern == SEARCHED or is_static(PATTERNS[case.pattern]) else 1
        self._map, self._inputs, self._block_k = conversation(case), inputs, block_k
        self._basis = inputs.basis if case.pattern in CHOOSING else None
        self._range = (case.tokens - case.rows, case.tokens)

    def make(self) -> list[BlockPlan]:
        """The plan of each layer that has patterns of its own; one plan if all are alike."""
        inputs = self._inputs
        chunk = RequestChunk(self._map, *self._range, 0, inputs.slots)
        planner = BatchPlanner([chunk], len(inputs.q), block_k=self._block_k)
        return [planner.plan(heads, inputs.q, inputs.k_cache, inputs.scale, self._basis) for heads in self._heads]


def _work(case: Case, plans: list[BlockPlan], ms: float) -> dict[str, Any]:
    """What the plans of some layers visit, their means, and the rate at which that is done."""
    heads, kv_heads = SHAPES[case.shape]
    density = mean(measure.visited_pairs(plan) for plan in plans) / measure.causal_pairs(case.rows, case.tokens)
    uses = [asdict(measure.use(work_items(plan, heads // kv_heads, PAIRS), HEAD_DIM)) for plan in plans]
    return {
        "density": density,
        "sparse_ms": ms,
        "tflops_on_visited_tiles": _tflops(case, density, ms),
        **{name: mean(use[name] for use in uses) for name in uses[0]},
    }


def _tflops(case: Case, density: float, ms: float) -> float:
    flop = 4 * HEAD_DIM * SHAPES[case.shape][0] * density * measure.causal_pairs(case.rows, case.tokens)
    return flop / ms / 1e9


def _index(case: Case, plan: BlockPlan, inputs: Inputs) -> dict[str, Any]:
    """Index bytes of one plan. All layers share a static plan of one pattern; the plan of an estimated pattern is
    dropped after its layer; the layers of a searched config keep one each."""
    plan_bytes, kv_bytes = measure.index_bytes(plan), inputs.k_cache.nbytes + inputs.v_cache.nbytes
    return {
        "index_bytes": plan_bytes,
        "kv_bytes_of_a_layer": kv_bytes,
        "index_share_of_kv": plan_bytes / (kv_bytes * (1 if case.pattern == SEARCHED else LAYERS[case.shape])),
        "index_share_of_a_layers_kv": plan_bytes / kv_bytes,
    }


def _short(value: Any) -> Any:
    """Floats rounded to five digits, which is more than a clock tells."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def run_cases(
    chosen: list[Case],
    device: str,
    executor: str,
    out: Path,
    minutes: float,
    retry: bool,
    checks: int,
    block_k: int = BLOCK_K,
) -> dict[str, Any]:
    """Run the self-check `checks` times, then the cases that the result file `out` lacks, and write `out` after each.

    Args:
        minutes: start no case after this long. retry: run cases again that failed. block_k: keys of a key tile.

    Returns:
        All results.
    """
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"cases": {}, "runs": []}
    began, bench = time.monotonic(), Bench(device, executor, block_k)
    about = {**machine.describe(), "card": measure.describe_card(), "baselines": baselines.installed()}
    results["runs"].append(about | {"executor": executor, "block_k": block_k, "timing": measure.METHOD})
    if checks:
        results["runs"][-1]["self_check"] = _checked(bench, checks)
        _write(out, results)
    for case in chosen:
        previous = results["cases"].get(case.name)
        if previous is not None and not (retry and "error" in previous):
            continue
        if time.monotonic() - began > 60 * minutes:
            print("Time is up; run again to go on.")
            break
        figures = _guarded(bench, case)
        results["cases"][case.name] = {**asdict(case), **figures, "run": len(results["runs"]) - 1}
        _write(out, results)
        print(report.line(case.name, figures), flush=True)
        if not _device_is_well(device):
            print("The device takes no more work after this error; run again to go on with the next case.")
            break
    bench.free()
    return results


def _write(out: Path, results: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def _checked(bench: Bench, times: int) -> dict[str, Any]:
    """What the self-check found in some runs, each of which runs its cases more than once; or its error."""
    found: dict[str, Any] = {"times": times}
    try:
        results = [bench.check() for _ in range(times)]
    except Exception as error:  # the cases fail as well, and say of which shapes that is true
        return found | {"good": False, "answer": f"{type(error).__name__}: {error}"[:600]}
    worst = next((answer for answer in results if not answer.good), results[-1])
    print(f"self-check, {times} times: {worst}{'' if worst.good else ': WRONG'}", flush=True)
    return found | {"good": worst.good, "answer": str(worst)}


def _guarded(bench: Bench, case: Case) -> dict[str, Any]:
    """The figures of the case, or its error: one failing case must not cost the others."""
    try:
        return bench.run(case)
    except baselines.NotApplicable as reason:
        return {"not_applicable": str(reason)}
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:600]
    bench.free()  # outside the handler, because the traceback holds tensors
    return {"error": message}


def _device_is_well(device: str) -> bool:
    """False after an illegal memory access, after which the process can only end."""
    try:
        measure.wait(device)
    except RuntimeError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--executor", choices=tuple(executors.EXECUTORS), default="triton", help="what runs plans; default: triton"
    )
    parser.add_argument(
        "--checks", type=int, default=CHECKS, help="how often the self-check runs; default: %(default)s"
    )
    parser.add_argument("--block-k", type=int, default=BLOCK_K, help="keys of a key tile; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no case after this long")
    parser.add_argument("--retry", action="store_true", help="run cases again that failed")
    parser.add_argument("--tune", action="store_true", help="time the candidate builds of the kernel instead")
    parser.add_argument("--tiny", action="store_true", help="very small cases, on a CPU too")
    parser.add_argument("--out", type=Path, help=f"default: in {RESULTS}")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("expected a GPU; --tiny with TRITON_INTERPRET=1 runs small cases without")
    if options.tune:
        from sglang_mminfer.benchmarks import tuning

        return tuning.main(options.out or RESULTS / "gpu_tuning.json", device, options.tiny, options.minutes)
    keys = "" if options.block_k == BLOCK_K else f"_{options.block_k}"
    name = "tiny" if options.tiny else f"gpu_tile_attention_{options.executor}{keys}"
    out = options.out or RESULTS / f"{name}.json"
    optional = tuple(name for name, state in baselines.installed().items() if state == "installed")
    chosen = list(tiny_cases() if options.tiny else cases(optional))
    results = run_cases(
        chosen, device, options.executor, out, options.minutes, options.retry, options.checks, options.block_k
    )
    table = report.markdown(results)
    out.with_suffix(".md").write_text(table)
    print(table)
    report.draw_if_possible(out)
    done = sum(case.name in results["cases"] for case in chosen)
    failed = sum("error" in figures for figures in results["cases"].values())
    print(f"{done} of {len(chosen)} cases done, {failed} failed. Results: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
