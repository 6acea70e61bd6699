"""What the server tells a Prometheus: under vLLM's names, which dashboards and autoscalers chart.

Figures of the engine are read when they are asked for; latencies are those of tokens as the engine
made them, so a slow reader does not change them.

Source of names and meanings: vLLM documentation, "Production Metrics".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nybble.engine.limits import EngineStats
from nybble.engine.request import Request

if TYPE_CHECKING:
    from nybble.serve.generation import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper ends of buckets, vLLM's.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_BETWEEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_REQUEST_S = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_TOKENS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000),
    *(100_000, 200_000),
)


@dataclass(slots=True)
class Times:
    """When one choice was asked for, and its first and last tokens came; 0 before they did."""

    began: float
    first: float = 0.0
    last: float = 0.0


class Metrics:
    """The figures of one server, of which `most` sequences run at once. `stats` reads the
    engine's."""

    def __init__(self, model: str, most: int, stats: Callable[[], EngineStats]) -> None:
        # A series for each other, with when it began; a restart shows in the counters anyway.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(model, most, stats))
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            model,
            _FIRST_TOKEN_S,
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", model, _BETWEEN_S
        )
        self._request = self._histogram(
            "e2e_request_latency_seconds",
            "From arrival to a request's last token.",
            model,
            _REQUEST_S,
        )
        self._queue = self._histogram(
            "request_queue_time_seconds",
            "What a choice waited until the engine first computed for it.",
            model,
            _REQUEST_S,
        )
        self._prompt = self._histogram(
            "request_prompt_tokens", "Tokens of a request's prompt.", model, _TOKENS
        )
        self._generated = self._histogram(
            "request_generation_tokens", "Tokens made for a request.", model, _TOKENS
        )
        self._ended = Counter(
            "vllm:request_success",
            "Requests that ended, by how: stop, length, or abort (the client left, or an error).",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._answered = Counter(
            "nybble:http_responses",
            "Answers by path and status.",
            ("model_name", "path", "status"),
            registry=self._registry,
        )
        self._model = model

    def _histogram(
        self, name: str, meaning: str, model: str, buckets: Sequence[float]
    ) -> Histogram:
        made = Histogram(
            f"vllm:{name}", meaning, ("model_name",), buckets=buckets, registry=self._registry
        )
        return made.labels(model)

    def token(self, times: Times, at: float) -> None:
        """Count a token that came at a time."""
        if times.last:
            self._between.observe(at - times.last)
        else:
            times.first = at
            self._first_token.observe(at - times.began)
        times.last = at

    def queued(self, seconds: float) -> None:
        """Count how long a choice waited until the engine first computed for it."""
        self._queue.observe(seconds)

    def ended(
        self, requests: Sequence[Request], answers: Sequence[Answer], times: Sequence[Times]
    ) -> None:
        """Count requests that are over, with the answers to all of their choices."""
        for i, request in enumerate(requests):
            n = request.params.n
            own = range(i * n, (i + 1) * n)
            made = sum(len(answers[j].tokens) for j in own)
            reasons = {answers[j].finish for j in own}
            reason = "abort" if "" in reasons else "length" if "length" in reasons else "stop"
            self._ended.labels(self._model, reason).inc()
            self._prompt.observe(len(request.prompt))
            self._generated.observe(made)
            if reason != "abort":
                self._request.observe(max(times[j].last for j in own) - times[i * n].began)

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        self._answered.labels(self._model, path, str(status)).inc()

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


#: A name, what it means, and its values by the value of one label more than the model's name; that
#: label's name is "" where there is none.
_Figure = tuple[str, str, str, Mapping[str, float]]


class _EngineFigures(Collector):
    def __init__(self, model: str, most: int, stats: Callable[[], EngineStats]) -> None:
        self._model, self._most, self._stats = model, most, stats

    def collect(self) -> Iterable[Metric]:
        """The engine's own figures, as they are now."""
        now = self._stats()
        for figure in (*_gauges(now), _plain("nybble:max_sequences", _AT_ONCE, self._most)):
            yield self._filled(GaugeMetricFamily, figure)
        for figure in (*_counters(now), *_cache_counters(now), *_draft_counters(now)):
            yield self._filled(CounterMetricFamily, figure)

    def _filled(
        self, kind: type[GaugeMetricFamily] | type[CounterMetricFamily], figure: _Figure
    ) -> Metric:
        name, meaning, label, values = figure
        made = kind(name, meaning, labels=("model_name", label) if label else ("model_name",))
        for value_of_label, value in values.items():
            labels = (self._model, value_of_label) if label else (self._model,)
            made.add_metric(labels, value)
        return made


_AT_ONCE = "Sequences that can run at once."


def _plain(name: str, meaning: str, value: float) -> _Figure:
    return name, meaning, "", {"": value}


def _gauges(now: EngineStats) -> Iterable[_Figure]:
    used = now.pages_used / max(now.pages, 1)
    yield _plain("vllm:num_requests_running", "Choices that are being generated.", now.running)
    yield _plain("vllm:num_requests_waiting", "Choices that wait for their turn.", now.waiting)
    yield _plain("vllm:kv_cache_usage_perc", "Pages in use; 1 is all of them.", used)
    yield _plain("nybble:kv_cache_pages", "Pages that there are.", now.pages)
    yield _plain("nybble:state_slots", "Slots of recurrent states that there are.", now.slots)
    yield _plain("nybble:state_slots_used", "Slots of recurrent states in use.", now.slots_used)
    yield _plain(
        "nybble:prefix_cache_pages", "Pages kept for prompts that begin alike.", now.cached_pages
    )
    yield _plain(
        "nybble:prefix_cache_snapshots",
        "Snapshots of recurrent states that there is room for.",
        now.snapshots,
    )
    yield _plain("nybble:prefix_cache_snapshots_used", "Snapshots kept.", now.snapshots_used)
    # The engine's own reason has figures in it: as a label it would be another one each time.
    why = {"does not pay" if now.draft_steps else "not asked for": 1.0} if now.drafting else {}
    yield "nybble:drafting_off", "1 while no tokens are guessed ahead, by why.", "reason", why


def _counters(now: EngineStats) -> Iterable[_Figure]:
    yield _plain(
        "vllm:prompt_tokens",
        "Tokens of prompts, computed or from the prefix cache.",
        now.prompt_tokens,
    )
    yield _plain("vllm:generation_tokens", "Tokens generated.", now.generated_tokens)
    yield _plain("vllm:num_preemptions", "Times a sequence had to give its pages.", now.preemptions)
    yield _plain("nybble:recomputed_tokens", "Tokens computed again.", now.recomputed_tokens)
    yield _plain("nybble:engine_steps", "Steps of the engine.", now.steps)
    yield _plain("nybble:kv_cache_clipped", "Values too large for FP8 pages.", now.clipped)


def _cache_counters(now: EngineStats) -> Iterable[_Figure]:
    yield _plain(
        "vllm:prefix_cache_queries", "Tokens of prompts that were looked up.", now.cache_queries
    )
    yield _plain("vllm:prefix_cache_hits", "Those that the cache had.", now.cache_hits)
    yield (
        "nybble:prefix_cache_misses",
        "Prompts of which the cache did not have all that could be, by why.",
        "reason",
        {reason: count for reason, count in now.cache_misses if reason != "hit"},
    )
    yield _plain(
        "nybble:prefix_cache_evictions",
        "Pages and snapshots given up for others.",
        now.cache_evictions,
    )


def _draft_counters(now: EngineStats) -> Iterable[_Figure]:
    yield _plain(
        "vllm:spec_decode_num_drafts", "Times guesses of a sequence were verified.", now.draft_steps
    )
    yield _plain("vllm:spec_decode_num_draft_tokens", "Tokens guessed.", now.drafted)
    yield _plain("vllm:spec_decode_num_accepted_tokens", "Those that were right.", now.accepted)
    yield (
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Those that were right, by their place among the guesses of a step, from 0.",
        "position",
        {str(i): count for i, count in enumerate(now.accepted_by_position)},
    )
