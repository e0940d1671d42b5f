"""The figures of the trace, the audit and the guard as counters of SGLang's Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from sglang_mminfer.serving.trace import GuardedHead, LayerAudit, PrefillRecord


class PrefillMetrics:
    """The figures of the trace as Prometheus counters. Made only if SGLang's metrics are on."""

    def __init__(self) -> None:
        # Imported late: on its first import prometheus_client reads the multiprocess directory, which SGLang sets.
        from prometheus_client import Counter

        self._requests = Counter(
            "sglang:mminfer_prefill_requests",
            "Requests in prefill batches by how they ran: sparse, or the reason for dense.",
            labelnames=("ran",),
        )
        self._tokens = Counter(
            "sglang:mminfer_prefill_tokens",
            "New tokens in prefill batches by how they ran: sparse, or the reason for dense.",
            labelnames=("ran",),
        )
        self._density_tokens = Counter(
            "sglang:mminfer_density_tokens",
            "Density times new tokens of sparse prefills: over the sparse tokens it is the mean density. On a GPU "
            "without a trace it is by the area of tiles.",
        )
        self._plan_ms = Counter("sglang:mminfer_plan_ms", "Milliseconds spent on plans of sparse prefills.")
        self._attn_ms = Counter(
            "sglang:mminfer_attn_ms",
            "Milliseconds spent in attention of prefill batches; on a GPU only with a trace, which waits for it.",
        )
        self._again = Counter(
            "sglang:mminfer_encoded_again",
            "Media that the vision encoder ran on once more, because SGLang's embedding cache had refused them.",
        )
        self._again_ms = Counter("sglang:mminfer_encoded_again_ms", "Milliseconds that the encoder spent so.")

    def count(self, ran: str, requests: int, tokens: int) -> None:
        """Counts requests and their tokens of one batch."""
        self._requests.labels(ran).inc(requests)
        self._tokens.labels(ran).inc(tokens)

    def add(self, records: list[PrefillRecord]) -> None:
        """Counts the records of one batch."""
        for record in records:
            self.count(record.dense_reason or "sparse", 1, record.chunk_len)
            if record.density is not None:
                self._density_tokens.inc(record.density * record.chunk_len)
        if records:
            self._plan_ms.inc(records[0].plan_ms)
            self._attn_ms.inc(records[0].attn_ms)
            self._again.inc(records[0].encoded_again)
            self._again_ms.inc(records[0].encoded_again_ms)


class AuditMetrics:
    """The audit's figures as Prometheus counters, by layer. Each tensor-parallel rank adds those of its own heads."""

    def __init__(self) -> None:
        from prometheus_client import Counter  # late: see PrefillMetrics

        self._rows, self._error, self._lost = (
            Counter(f"sglang:mminfer_audit_{name}", text, labelnames=("layer",))
            for name, text in (
                ("rows", "Query rows of sparse prefills that were computed again densely, by layer."),
                ("error_rows", "Relative output error times audited rows: over the rows it is the mean error."),
                ("lost_rows", "Attention mass not visited times audited rows: 1 minus this over the rows is recall."),
            )
        )
        self._ms = Counter("sglang:mminfer_audit_ms", "Milliseconds spent on audits.")
        self._failures = Counter("sglang:mminfer_audit_failures", "Audits of a request's layer that failed.")

    def add(self, audited: list[LayerAudit], milliseconds: float, failures: int) -> None:
        """Counts the audits of one batch."""
        for finding in audited:
            layer = str(finding.layer)
            self._rows.labels(layer).inc(finding.rows)
            self._error.labels(layer).inc(finding.error_mean * finding.rows)
            self._lost.labels(layer).inc((1.0 - finding.recall_mean) * finding.rows)
        self._ms.inc(milliseconds)
        self._failures.inc(failures)


class GuardMetrics:
    """The heads that the guard made dense, by layer. Each tensor-parallel rank adds its own."""

    def __init__(self) -> None:
        from prometheus_client import Counter  # late: see PrefillMetrics

        self._heads = Counter(
            "sglang:mminfer_guarded_heads",
            "Heads that the guard has made dense for later requests, by layer.",
            labelnames=("layer",),
        )

    def add(self, heads: Iterable[GuardedHead]) -> None:
        """Counts heads that are dense from now on."""
        for head in heads:
            self._heads.labels(str(head.layer)).inc()


@cache
def prefill_metrics() -> PrefillMetrics:
    """This process's counters, made once.

    Two-batch overlap makes three attention backends in a process, and Prometheus takes a name only once.
    """
    return PrefillMetrics()


@cache
def audit_metrics() -> AuditMetrics:
    """This process's counters, made once as `prefill_metrics`."""
    return AuditMetrics()


@cache
def guard_metrics() -> GuardMetrics:
    """This process's counters, made once as `prefill_metrics`."""
    return GuardMetrics()
