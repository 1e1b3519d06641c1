"""The HTTP endpoint for Prometheus. A scrape reads the state of the run in a thread of this process: it costs the hub
nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from zerotop.outputs.families import FAMILIES, Family
from zerotop.state.run import RunState

if TYPE_CHECKING:
    from prometheus_client import Metric


class RunCollector:
    """prometheus_client's interface of a collector. `state()` is the current state, which changes only while its `lock`
    is not held."""

    def __init__(self, run: str, state: Callable[[], RunState], lock: AbstractContextManager[object]) -> None:
        self._run = run
        self._state = state
        self._lock = lock

    def collect(self) -> Iterator[Metric]:
        """Every family, also one without samples: a page always has the same names."""
        with self._lock:
            state = self._state()
            found = [(family, list(family.read(state))) for family in FAMILIES]
        for family, samples in found:
            metric = _metric(family)
            for labels, value in samples:
                metric.add_metric((self._run, *labels), value)
            yield metric


def _metric(family: Family) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    return make(f"zerotop_{family.name}", family.description, labels=("run", *family.labels))


class MetricsServer:
    """Serves http://HOST:PORT/metrics until it is closed. Raises OSError if it can't listen there."""

    def __init__(self, host: str, port: int, collector: RunCollector) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)
        self._server, self._thread = start_http_server(port, host, registry)
        self._host = host

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
