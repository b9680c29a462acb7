"""What /metrics says: vLLM's names, which dashboards read, and what only an emulated endpoint has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.api.settings import Emulated
from runtime.serving.service import Counts, Update

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)


class _Counted(Collector):
    """The service's own counts, asked for when somebody looks."""

    def __init__(self, model: str, counts: Callable[[], Counts | None], emulated: bool):
        self._model, self._counts, self._emulated = model, counts, emulated

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        if counts is None:
            return
        gauges = [
            ("vllm:num_requests_running", "Requests in a step's batch.", counts.running),
            ("vllm:num_requests_waiting", "Requests that wait to be admitted.", counts.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the cache's pages that requests hold; 1 is all.", counts.kv_share),
        ]
        if self._emulated:
            gauges += [
                ("glm5_late_seconds", "How far this machine is behind the emulated clock now.", counts.late_s),
                ("glm5_most_late_seconds", "How far it was behind at worst.", counts.most_late_s),
            ]
        counters = [
            ("vllm:prompt_tokens", "Prompt tokens taken.", counts.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", counts.generated_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", counts.prefix_queried),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", counts.prefix_hit),
            ("vllm:num_preemptions", "Requests that gave their pages back and began again.", counts.preemptions),
            ("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", counts.drafted),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", counts.accepted),
            ("glm5_steps", "Steps of the model.", counts.steps),
        ]
        for family, found in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in found:
                metric = family(name, text, labels=["model_name"])
                metric.add_metric([self._model], value)
                yield metric


class Metrics:
    """One server's. counts: those of its service, None while there is none."""

    def __init__(self, model: str, counts: Callable[[], Counts | None], emulated: Emulated | None = None):
        self._registry = CollectorRegistry()
        self._registry.register(_Counted(model, counts, emulated is not None))

        def timed(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            found = Histogram(name, text, ["model_name"], registry=self._registry, buckets=buckets)
            return found.labels(model)

        self.first_token_s = timed("vllm:time_to_first_token_seconds", "From a request to its first token.")
        self.between_tokens_s = timed("vllm:inter_token_latency_seconds", "From token to token.", _BETWEEN)
        self.whole_s = timed("vllm:e2e_request_latency_seconds", "From a request to its end.")
        self.queue_s = timed("vllm:request_queue_time_seconds", "From a request to its admission.")
        self.prefill_s = timed("vllm:request_prefill_time_seconds", "From admission to the first token.")
        self.decode_s = timed("vllm:request_decode_time_seconds", "From the first token to the last.")
        self._model = model
        self._time_scale = 1.0 if emulated is None else emulated.time_scale
        self._ended = Counter(
            "vllm:request_success", "Requests that ended.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._refused = Counter(
            "glm5_requests_refused", "Requests that were refused.", ["model_name", "status"], registry=self._registry
        )
        if emulated is not None:
            labels = {
                "profile": emulated.profile, "devices": str(emulated.devices), "plan": emulated.plan,
                "evidence": emulated.evidence, "band": emulated.band, "tokens": emulated.tokens,
            }  # fmt: skip
            Gauge("glm5_emulated_info", "What is emulated.", list(labels), registry=self._registry).labels(
                **labels
            ).set(1)
            Gauge("glm5_kv_pages_share", "Share of the plan's KV pages that are here.", registry=self._registry).set(
                emulated.kv_share
            )
            Gauge("glm5_time_scale", "Wall-clock seconds a second of the chips.", registry=self._registry).set(
                emulated.time_scale
            )

    def first_token(self, seconds: float, update: Update) -> None:
        """A request has its first token, so many seconds of the wall after it came. Behind its admission, as the
        service's clock has it, it was prefilled; before, it was queued."""
        self.first_token_s.observe(seconds)
        if update.admitted_at_s is not None:
            in_steps = min(seconds, (update.at_s - update.admitted_at_s) * self._time_scale)
            self.prefill_s.observe(in_steps)
            self.queue_s.observe(seconds - in_steps)

    def ended(self, finish: str) -> None:
        self._ended.labels(self._model, finish).inc()

    def refused(self, status: int) -> None:
        self._refused.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
