"""The hub's and the door's numbers for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flash.hub.hub import InferenceHub
from flash.hub.reports import HubStats

# From a small policy's short answer to a long one on a busy pool.
_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """In a registry of its own: two doors in one process do not meet."""

    def __init__(self, hub: InferenceHub) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_HubCollector(hub))
        self.requests = Counter(
            "flash_door_requests", "Requests answered.", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self.generate_s = Histogram(
            "flash_door_generate_seconds", "From asking the hub to its response.", ["worker"],
            buckets=_BUCKETS_S, registry=self._registry,
        )  # fmt: skip

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


class _HubCollector(Collector):
    """Reads the hub when it is asked, so that nothing is counted twice."""

    def __init__(self, hub: InferenceHub) -> None:
        self._hub = hub

    def collect(self) -> Iterator[Metric]:
        stats = self._hub.stats()
        yield from _of_the_hub(stats)
        yield from _of_the_workers(stats)


def _of_the_hub(stats: HubStats) -> Iterator[Metric]:
    gauges = {
        "version": ("Policy version.", stats.version),
        "queued": ("Requests that wait for a worker with room.", stats.queued),
        "running": ("Requests at the workers.", stats.running),
    }
    counters = {
        "requests": ("Requests answered.", stats.requests),
        "retries": ("Requests that went on at another worker.", stats.retries),
        "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
        "generated_tokens": ("Tokens sampled.", stats.generated_tokens),
        "publishes": ("Publishes.", stats.publishes),
        "paused_seconds": ("Time that publishes took, over all workers.", stats.paused_s),
        "load_seconds": ("Of that, loading weights.", stats.load_s),
        "reset_seconds": ("Of that, dropping keys and values of what runs.", stats.reset_s),
        "mixed_tokens": ("Tokens over keys and values of older weights.", stats.mixed_tokens),
    }
    for name, (about, value) in gauges.items():
        yield GaugeMetricFamily(f"flash_hub_{name}", about, value=value)
    for name, (about, total) in counters.items():
        yield CounterMetricFamily(f"flash_hub_{name}", about, value=total)


def _of_the_workers(stats: HubStats) -> Iterator[Metric]:
    healthy = GaugeMetricFamily("flash_worker_healthy", "1, or 0 while out.", labels=["worker"])
    version = GaugeMetricFamily("flash_worker_version", "Policy version.", labels=["worker"])
    running = GaugeMetricFamily("flash_worker_running", "Requests there.", labels=["worker"])
    tokens = GaugeMetricFamily(
        "flash_worker_outstanding_tokens", "Tokens of those requests.", labels=["worker"]
    )
    busy = CounterMetricFamily(
        "flash_worker_busy_seconds", "Time with a request.", labels=["worker"]
    )
    for worker in stats.workers:
        healthy.add_metric([worker.name], float(worker.healthy))
        version.add_metric([worker.name], worker.version)
        running.add_metric([worker.name], worker.running)
        tokens.add_metric([worker.name], worker.outstanding_tokens)
        busy.add_metric([worker.name], worker.busy_s)
    yield from (healthy, version, running, tokens, busy)
