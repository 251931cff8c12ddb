"""What happened when, as a trace that Perfetto (https://ui.perfetto.dev) opens.

One lane for each worker, agent and the trainer. An agent's lane is filled with the episodes that
it lived, one after another.
"""

import asyncio
import gzip
import heapq
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PIDS = {"trainer": 1, "workers": 2, "agents": 3}


class Timeline:
    """Collects spans and counters, in microseconds of simulated time."""

    def __init__(self) -> None:
        self._now = asyncio.get_running_loop().time
        self._events: list[dict[str, Any]] = []
        self._lanes: dict[tuple[str, str], int] = {}
        self._agent_of: dict[int, int] = {}
        self._free_agents: list[int] = []
        self._agents = 0

    # ── what is told to it ───────────────────────────────────────────────────────────────────

    def trainer(self, name: str, began_s: float, **details: Any) -> None:
        """The trainer did that until now."""
        self._span("trainer", "trainer", name, began_s, details)

    def worker(self, worker: str, name: str, began_s: float, **details: Any) -> None:
        """The worker did that until now."""
        self._span("workers", worker, name, began_s, details)

    def running(self, worker: str, requests: int, kv_share: float) -> None:
        """How full the worker is from now on."""
        self._events.append(
            {
                "ph": "C",
                "pid": _PIDS["workers"],
                "name": worker,
                "ts": self._us(self._now()),
                "args": {"requests": requests, "kv %": round(100 * kv_share, 1)},
            }
        )

    def episode_began(self, number: int) -> None:
        """An agent lives it from now on."""
        if self._free_agents:
            self._agent_of[number] = heapq.heappop(self._free_agents)
        else:
            self._agent_of[number] = self._agents
            self._agents += 1

    def episode_ended(self, number: int) -> None:
        heapq.heappush(self._free_agents, self._agent_of.pop(number))

    def episode(self, number: int, stage: str, seconds: float, **details: Any) -> None:
        """The episode was in that stage for so long, until now."""
        lane = f"agent {self._agent_of[number]:04d}"
        details = {"episode": number, **details}
        self._span("agents", lane, stage, self._now() - seconds, details)

    def generated(
        self, number: int, worker: str, began_s: float, *, tokens: float, versions: Sequence[int]
    ) -> None:
        """The worker answered the episode's request."""
        details = {"worker": worker, "tokens": int(tokens), "versions": sorted(set(versions))}
        self.episode(number, "generate", self._now() - began_s, **details)

    # ── the file ─────────────────────────────────────────────────────────────────────────────

    def write(self, path: Path) -> None:
        """In Chrome's trace format, compressed if the name ends in `.gz`."""
        text = json.dumps({"traceEvents": [*self._names(), *self._events]})
        if path.suffix == ".gz":
            # No date and no name inside, so that the same trace is the same file.
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            path.write_text(text)

    def _names(self) -> list[dict[str, Any]]:
        names: list[dict[str, Any]] = [
            _named("process_name", pid, 0, group) for group, pid in _PIDS.items()
        ]
        for (group, lane), tid in sorted(self._lanes.items()):
            names.append(_named("thread_name", _PIDS[group], tid, lane))
        return names

    def _span(
        self, group: str, lane: str, name: str, began_s: float, details: Mapping[str, Any]
    ) -> None:
        tid = self._lanes.setdefault((group, lane), len(self._lanes))
        began, ended = self._us(began_s), self._us(self._now())
        event = {"ph": "X", "pid": _PIDS[group], "tid": tid, "name": name, "ts": began}
        self._events.append({**event, "dur": ended - began, "args": dict(details)})

    @staticmethod
    def _us(seconds: float) -> int:
        return round(seconds * 1e6)


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}
