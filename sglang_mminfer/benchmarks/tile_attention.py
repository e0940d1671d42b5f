"""The Triton kernel on one GPU against dense attention and against other sparse kernels, side by side in one run.

    python -m sglang_mminfer.benchmarks.tile_attention [--minutes 7] [--out FILE]
    python -m sglang_mminfer.benchmarks.tile_attention --tune

Dense is torch's cuDNN attention, which is in FlashAttention-3's class. The most important cases come first. The
result file is written after each case, and a case that is in it is skipped, so the same command continues a run that
was cut short. A case that fails is written with its error and tried again only with --retry. At the end the program
writes a Markdown table, and plots if matplotlib is installed.

--tune times the candidate builds of the kernel instead (`tuning.py`).

`TRITON_INTERPRET=1 ... --tiny` runs very small cases on a CPU. They show that the program works; their times mean
nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sglang_mminfer.benchmarks import measure, report
from sglang_mminfer.benchmarks import rivals as baselines
from sglang_mminfer.benchmarks.cases import HEAD_DIM, LAYERS, PATTERNS, SHAPES, Case, cases, conversation, tiny_cases
from sglang_mminfer.benchmarks.inputs import Inputs, make_inputs
from sglang_mminfer.kernels.block_plan import BlockPlan
from sglang_mminfer.kernels.triton import launch
from sglang_mminfer.kernels.triton.launch import configuration_on
from sglang_mminfer.kernels.work_items import work_items
from sglang_mminfer.planning.chunk import RequestChunk
from sglang_mminfer.planning.planner import BatchPlanner, is_static
from sglang_mminfer.tools import machine

RESULTS = Path("sglang_mminfer/benchmarks/results")


class Bench:
    """Measures cases one after the other. Successive cases with the same inputs share tensors and the dense time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._made_for: tuple[str, int, int, str] | None = None
        self._inputs: Inputs | None = None
        self._dense: dict[str, Any] | None = None

    def run(self, case: Case) -> dict[str, Any]:
        """The figures of one case."""
        inputs = self._inputs_of(case)
        planned = _Planned(case, inputs)
        plan = planned.make()
        work = lambda: launch.run(inputs.q, inputs.k_cache, inputs.v_cache, plan, inputs.scale, inputs.out, inputs.lse)  # noqa: E731
        sparse = measure.timed(work, self.device)
        if not bool(torch.isfinite(inputs.out).all()):
            raise ArithmeticError("the output holds values that are not finite")
        figures = {**_work(case, plan, sparse.ms), **_index(case, plan, inputs)}
        figures |= {"sparse_least_ms": sparse.least, "sparse_most_ms": sparse.most, "repeats": sparse.repeats}
        if case.against == "dense":
            figures |= self._against_dense(case, inputs, figures)
            figures |= _plan_share(case, measure.plan_cost(planned.make, self.device), sparse.ms)
            with_plan_ms = sparse.ms + figures["plan_wall_ms"] / figures["layers_of_a_plan"]
            figures["speedup_with_plan"] = figures["dense_ms"] / with_plan_ms
        else:
            figures |= self._against_other(case, inputs, plan, sparse.ms)
        return {key: _short(value) for key, value in figures.items()}

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

    def _against_other(self, case: Case, inputs: Inputs, plan: BlockPlan, sparse_ms: float) -> dict[str, Any]:
        other = baselines.AGAINST[case.against](inputs, plan)
        ms = measure.timed(other, self.device).ms
        return {"other_ms": ms, "speedup_over_other": ms / sparse_ms}


class _Planned:
    """Makes the plan of a case as a server does: the map exists already, the rest is new with every forward."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        heads, kv_heads = SHAPES[case.shape]
        self._heads, self._group = [PATTERNS[case.pattern]] * heads, heads // kv_heads
        self._map, self._inputs = conversation(case), inputs
        self._range = (case.tokens - case.rows, case.tokens)
        self._pairs = configuration_on(inputs.q.device, HEAD_DIM).rows if inputs.q.is_cuda else 128

    def make(self) -> BlockPlan:
        inputs = self._inputs
        chunk = RequestChunk(self._map, *self._range, 0, inputs.slots)
        plan = BatchPlanner([chunk], len(inputs.q)).plan(self._heads, inputs.q, inputs.k_cache, inputs.scale)
        work_items(plan, self._group, self._pairs).upload()  # the launcher does this in the first layer
        return plan


def _work(case: Case, plan: BlockPlan, ms: float) -> dict[str, Any]:
    density = measure.visited_pairs(plan) / measure.causal_pairs(case.rows, case.tokens)
    return {"density": density, "sparse_ms": ms, "tflops_on_visited_tiles": _tflops(case, density, ms)}


def _tflops(case: Case, density: float, ms: float) -> float:
    flop = 4 * HEAD_DIM * SHAPES[case.shape][0] * density * measure.causal_pairs(case.rows, case.tokens)
    return flop / ms / 1e9


def _index(case: Case, plan: BlockPlan, inputs: Inputs) -> dict[str, Any]:
    """Index bytes of one plan. All layers share a static plan; an estimated plan is dropped after its layer."""
    plan_bytes, kv_bytes = measure.index_bytes(plan), inputs.k_cache.nbytes + inputs.v_cache.nbytes
    return {
        "index_bytes": plan_bytes,
        "kv_bytes_of_a_layer": kv_bytes,
        "index_share_of_kv": plan_bytes / (kv_bytes * LAYERS[case.shape]),
        "index_share_of_a_layers_kv": plan_bytes / kv_bytes,
    }


def _plan_share(case: Case, cost: measure.PlanCost, attention_ms: float) -> dict[str, Any]:
    """Planning time over attention time. A static plan serves all layers of a forward, an estimated plan one layer."""
    static = is_static(PATTERNS[case.pattern])
    layers = LAYERS[case.shape] if static else 1
    return {
        "plan_host_ms": cost.host_ms,
        "plan_wall_ms": cost.wall_ms,
        "plan_device_ms": cost.device_ms,
        "layers_of_a_plan": layers,
        "plan_share_of_attention": cost.wall_ms / (attention_ms * layers),
    }


def _short(value: Any) -> Any:
    """Floats rounded to five digits, which is more than a clock tells."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def run_cases(chosen: list[Case], device: str, out: Path, minutes: float, retry: bool) -> dict[str, Any]:
    """Run the cases that the result file `out` lacks, and write `out` after each. Returns all results."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"cases": {}, "runs": []}
    began, bench = time.monotonic(), Bench(device)
    about = {**machine.describe(), "card": measure.describe_card(), "baselines": baselines.installed()}
    results["runs"].append(about | {"timing": measure.METHOD})
    for case in chosen:
        previous = results["cases"].get(case.name)
        if previous is not None and not (retry and "error" in previous):
            continue
        if time.monotonic() - began > 60 * minutes:
            print("Time is up; run again to go on.")
            break
        figures = _guarded(bench, case)
        results["cases"][case.name] = {**asdict(case), **figures, "run": len(results["runs"]) - 1}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(report.line(case.name, figures), flush=True)
        if not _device_is_well(device):
            print("The device takes no more work after this error; run again to go on with the next case.")
            break
    bench.free()
    return results


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
    out = options.out or RESULTS / ("tiny.json" if options.tiny else "gpu_tile_attention.json")
    optional = tuple(name for name, state in baselines.installed().items() if state == "installed")
    chosen = list(tiny_cases() if options.tiny else cases(optional))
    results = run_cases(chosen, device, out, options.minutes, options.retry)
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
