"""The Triton kernel on one GPU against dense attention and against other sparse kernels, side by side in one run.

    python -m sglang_mminfer.benchmarks.tile_attention [--minutes 7] [--out FILE]
    python -m sglang_mminfer.benchmarks.tile_attention --tune

Dense is torch's cuDNN attention, the FlashAttention-3 class where FA3 itself is not installed. Most important cases
come first; the result file is written after each and cases it has are skipped, so that a run that was cut short
goes on where it stopped. A case that fails is kept with its error and tried again only with --retry. At the end
comes a table, also as Markdown, and plots where matplotlib is installed.

--tune times the candidate builds of the kernel instead (`tuning.py`).

`TRITON_INTERPRET=1 ... --tiny` runs very small cases on a CPU: it shows that the program works, and its times
mean nothing.
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
from sglang_mminfer.kernels.block_plan import PrefillPlan
from sglang_mminfer.kernels.triton import launch
from sglang_mminfer.kernels.triton.work_order import work_order
from sglang_mminfer.planning.planner import BatchPlanner, RequestChunk, is_static
from sglang_mminfer.tools import machine

RESULTS = Path("sglang_mminfer/benchmarks/results")


class Bench:
    """Measures cases one after the other; tensors and the dense time of cases that share them are made once."""

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
            own = sparse.ms + figures["plan_wall_ms"] / figures["layers_of_a_plan"]
            figures["speedup_with_plan"] = figures["dense_ms"] / own
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
        """Give the tensors back."""
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

    def _against_other(self, case: Case, inputs: Inputs, plan: PrefillPlan, sparse_ms: float) -> dict[str, Any]:
        other = baselines.AGAINST[case.against](inputs, plan)
        ms = measure.timed(other, self.device).ms
        return {"other_ms": ms, "speedup_over_other": ms / sparse_ms}


class _Planned:
    """Makes the plan of a case as a server would: the map is there, the rest is new with every forward."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        heads, kv_heads = SHAPES[case.shape]
        self._heads, self._group = [PATTERNS[case.pattern]] * heads, heads // kv_heads
        self._map, self._inputs = conversation(case), inputs
        self._range = (case.tokens - case.rows, case.tokens)

    def make(self) -> PrefillPlan:
        own = self._inputs
        chunk = RequestChunk(self._map, *self._range, 0, own.slots)
        plan = BatchPlanner([chunk], len(own.q)).plan(self._heads, own.q, own.k_cache, own.scale)
        for block_plan in plan.passes:
            work_order(block_plan, self._group)  # the launcher would, at the first layer
        return plan


def _work(case: Case, plan: PrefillPlan, ms: float) -> dict[str, Any]:
    density = measure.visited_pairs(plan) / measure.causal_pairs(case.rows, case.tokens)
    return {"density": density, "sparse_ms": ms, "tflops_on_visited_tiles": _tflops(case, density, ms)}


def _tflops(case: Case, density: float, ms: float) -> float:
    flop = 4 * HEAD_DIM * SHAPES[case.shape][0] * density * measure.causal_pairs(case.rows, case.tokens)
    return flop / ms / 1e9


def _index(case: Case, plan: PrefillPlan, inputs: Inputs) -> dict[str, Any]:
    """Index bytes, of one plan; a static plan is shared by all layers, and an estimated one is gone after its own."""
    own, kv = measure.index_bytes(plan), inputs.k_cache.nbytes + inputs.v_cache.nbytes
    return {
        "index_bytes": own,
        "kv_bytes_of_a_layer": kv,
        "index_share_of_kv": own / (kv * LAYERS[case.shape]),
        "index_share_of_a_layers_kv": own / kv,
    }


def _plan_share(case: Case, cost: measure.PlanCost, attention_ms: float) -> dict[str, Any]:
    """One plan serves all layers of a forward if it is static, one layer if it is estimated."""
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
    """Five digits are more than a clock tells."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def run_cases(chosen: list[Case], device: str, out: Path, minutes: float, retry: bool) -> dict[str, Any]:
    """Run what `out` does not have yet, and keep it up to date. Returns the whole report."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"cases": {}, "runs": []}
    began, bench = time.monotonic(), Bench(device)
    about = {**machine.describe(), "card": measure.describe_card(), "baselines": baselines.installed()}
    found["runs"].append(about | {"timing": measure.METHOD})
    for case in chosen:
        known = found["cases"].get(case.name)
        if known is not None and not (retry and "error" in known):
            continue
        if time.monotonic() - began > 60 * minutes:
            print("Time is up; run again to go on.")
            break
        figures = _guarded(bench, case)
        found["cases"][case.name] = {**asdict(case), **figures, "run": len(found["runs"]) - 1}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(report.line(case.name, figures), flush=True)
        if not _device_is_well(device):
            print("The device takes no more work after this error; run again to go on with the next case.")
            break
    bench.free()
    return found


def _guarded(bench: Bench, case: Case) -> dict[str, Any]:
    """The figures of the case, or what went wrong: one case must not cost the others."""
    try:
        return bench.run(case)
    except baselines.NotApplicable as reason:
        return {"not_applicable": str(reason)}
    except Exception as error:
        kept = f"{type(error).__name__}: {error}"[:600]
    bench.free()  # out of the handler: the traceback holds tensors
    return {"error": kept}


def _device_is_well(device: str) -> bool:
    """False after an illegal access: the process can then only end."""
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
    found = run_cases(chosen, device, out, options.minutes, options.retry)
    table = report.markdown(found)
    out.with_suffix(".md").write_text(table)
    print(table)
    report.draw_if_possible(out)
    done = sum(case.name in found["cases"] for case in chosen)
    failed = sum("error" in figures for figures in found["cases"].values())
    print(f"{done} of {len(chosen)} cases done, {failed} failed. Results: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
