"""What a run has to say about itself: puts each step's numbers together, for files and the view."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from flash.config import Config
from flash.environments.hosts import EnvHosts
from flash.errors import first_error
from flash.evaluation.result import Evaluation
from flash.explorer.hub import FleetHub
from flash.hub.hub import InferenceHub
from flash.hub.probe import Gap
from flash.hub.reports import PublishReport
from flash.log.log import Log
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer
from flash.telemetry.folder import RunFolder
from flash.telemetry.live import OfSet, Snapshot, View
from flash.telemetry.report import write_report
from flash.types import Batch

_TICK_S = 0.5
_SAYS_AFTER_S = 10.0


class Progress(Observer):
    """Puts together what is told of each step; tells its line and keeps the view fresh."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        view: View,
        *,
        hub: InferenceHub | FleetHub,
        rollouts: RolloutLoop,
        hosts: Sequence[EnvHosts],
        log: Log,
        observer: Observer,
        waits_for: Callable[[], str],
    ) -> None:
        self._config = config
        self._folder = folder
        self._view = view
        self._hub = hub
        self._rollouts = rollouts
        self._hosts = hosts
        self._count = sum(len(of_set) for of_set in hosts)
        self._log = log
        self._observer = observer
        self._waits_for = waits_for
        self._waits, self._waits_since = "", math.inf
        self._clock = asyncio.get_running_loop().time
        self._lines = folder.metrics()
        # A resumed run goes on where its clock stopped.
        before_s = self._lines[-1]["time_s"] if self._lines else 0.0
        self._began = self._clock() - before_s
        self._step_began = self._mark = self._clock()
        self._metrics: dict[str, Any] = {}
        self._wait_s = self._train_s = 0.0
        self._totals = self._busy_and_tokens()

    # ── the stages of a step ─────────────────────────────────────────────────────────────────

    def handed_over(self, batch: Batch) -> None:
        self._metrics |= batch.metrics
        self._metrics["alpha"] = self._rollouts.alpha_in_force
        self._wait_s += self._lap()
        self._metrics["time/wait_batch_s"] = self._wait_s

    def trained(self, metrics: Mapping[str, Any]) -> None:
        self._metrics |= metrics
        self._train_s += self._lap()
        self._metrics["time/train_s"] = self._train_s

    def published(self, report: PublishReport) -> None:
        if report.changed is not None:
            self._metrics["publish/changed"] = report.changed
        self._close_step(report.gap)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._metrics |= evaluation.metrics()
        if not evaluation.paused:
            return  # it took none of the step's time
        if not self._lines and "policy_version" not in self._metrics:
            # The start: nothing is trained yet, and this is what the end is compared with.
            self._write({"step": 0, "policy_version": self._hub.version})
        self._lap()

    def step_done(self, step: int) -> None:
        """Writes the step's line."""
        if "policy_version" not in self._metrics:  # its weights were not published
            self._close_step(None)
        stats = self._hub.stats()
        self._write(
            {
                "step": step,
                **self._rollouts.ledger.metrics(),
                "tokens/prompt": stats.prompt_tokens,
                "tokens/generated": stats.generated_tokens,
                "publish/count": stats.publishes,
                "publish/paused_s": stats.paused_s,
                "publish/load_s": stats.load_s,
                "publish/reset_s": stats.reset_s,
                "tokens/mixed": stats.mixed_tokens,
                "log/lag_s": self._log.take_most_lag_s(),
            }
        )
        self._view.step(self.snapshot())
        self._step_began = self._mark = self._clock()
        self._wait_s = self._train_s = 0.0
        self._totals = self._busy_and_tokens()

    @contextlib.asynccontextmanager
    async def ticking(self) -> AsyncIterator[None]:
        """Keeps the live view fresh while the block runs."""
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                ticker = tasks.create_task(self._tick(), name="live view")
                yield
                ticker.cancel()

    async def summarise(self, *, stopped: bool) -> dict[str, Any]:
        """Writes summary.json and report.png; returns the summary."""
        evaluations = [line for line in self._lines if "eval/success_rate" in line]
        summary = {
            "folder": str(self._folder.path),
            "env": self._config.env.name,
            "alpha": self._config.alpha,
            "seed": self._config.seed,
            "steps": self.steps_done,
            "stopped": stopped,
            "time_s": self._clock() - self._began,
            "eval_tasks": self._config.eval.tasks * len(self._config.sets),
            "eval_success_rate_first": _value(evaluations[:1], "eval/success_rate"),
            "eval_success_rate_last": _value(evaluations[-1:], "eval/success_rate"),
            "staleness_max": max((line.get("staleness/max", 0) for line in self._lines), default=0),
            "outcomes": self._rollouts.ledger.reasons(),
            "agent_crashes": self._rollouts.crashes,
            "tokens_generated": self._hub.stats().generated_tokens,
        }
        self._folder.summary(summary)
        # Drawing takes seconds; the loop is still serving its last agents.
        await asyncio.to_thread(self._folder.flush)
        await asyncio.to_thread(write_report, self._folder.path)
        return summary

    @property
    def steps_done(self) -> int:
        """The last step whose line is written."""
        step: int = self._lines[-1]["step"] if self._lines else 0
        return step

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What is known of the step until its line is written."""
        return self._metrics

    # ── the numbers ──────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        last = self._lines[-1] if self._lines else {}
        ledger = self._rollouts.ledger
        stats = self._hub.stats()
        ages = self._rollouts.ages()
        evaluations = [
            line["eval/success_rate"] for line in self._lines if "eval/success_rate" in line
        ]
        return Snapshot(
            step=self.steps_done,
            steps=self._config.steps,
            policy_version=self._hub.version,
            time_s=self._clock() - self._began,
            success_rate=last.get("success_rate"),
            reward_mean=last.get("reward/mean"),
            eval_success_rates=tuple(evaluations),
            running=ledger.running,
            ready=ledger.ready,
            capacity=self._rollouts.capacity,
            ages=sum(ages.values(), Counter()),
            tokens_per_s=last.get("tokens_per_s"),
            idle={role: last.get(f"idle/{role}") for role in ("trainer", "workers", "env_hosts")},
            staleness_mean=last.get("staleness/mean"),
            staleness_max=last.get("staleness/max"),
            waste_share=ledger.waste_tokens / max(1, stats.generated_tokens),
            outcomes=ledger.reasons(),
            success_rates=tuple(
                line["success_rate"] for line in self._lines if "success_rate" in line
            ),
            task_sets={name: self._of_set(name, ages[name]) for name in ages if name},
        )

    def _of_set(self, name: str, ages: Mapping[int, int]) -> OfSet:
        last = self._lines[-1] if self._lines else {}
        held_out = (line.get(f"eval/success_rate/{name}") for line in reversed(self._lines))
        ledger = self._rollouts.ledger
        return OfSet(
            success_rate=last.get(f"success_rate/{name}"),
            reward_mean=last.get(f"reward/mean/{name}"),
            held_out=next((rate for rate in held_out if rate is not None), None),
            running=ledger.running_of[name],
            ready=ledger.ready_of[name],
            ages=ages,
            staleness_mean=last.get(f"staleness/mean/{name}"),
            staleness_max=last.get(f"staleness/max/{name}"),
        )

    async def _tick(self) -> None:
        while True:
            self._view.tick(self.snapshot())
            self._say_what_it_waits_for()
            await asyncio.sleep(_TICK_S)

    def _say_what_it_waits_for(self) -> None:
        """In a line, once, if it has waited for it for a while."""
        waits = self._waits_for()
        if waits != self._waits:
            self._waits, self._waits_since = waits, self._clock()
        elif waits and self._clock() - self._waits_since >= _SAYS_AFTER_S:
            self._view.say(f"waits for {waits}")
            self._waits_since = math.inf

    def _close_step(self, gap: Gap | None) -> None:
        """What the step took is measured now; an evaluation may follow, which is no part of it."""
        largest = self._metrics.get("logprob_gap/max", math.nan)  # of tokens of age 0
        if gap is not None:
            self._metrics |= gap.metrics()
            largest = gap.max if math.isnan(largest) else max(gap.max, largest)
        self._metrics["logprob_gap/max"] = largest
        self._metrics["time/publish_s"] = self._lap()
        self._metrics["policy_version"] = self._hub.version
        self._measure_rates()

    def _lap(self) -> float:
        now = self._clock()
        elapsed, self._mark = now - self._mark, now
        return elapsed

    def _measure_rates(self) -> None:
        """Shares and rates over the step, from the last one's end to the end of its publish."""
        elapsed = max(1e-9, self._clock() - self._step_began)
        before, now = self._totals, self._busy_and_tokens()
        workers, hosts, tokens = (b - a for a, b in zip(before, now, strict=True))
        self._metrics["idle/trainer"] = self._metrics["time/wait_batch_s"] / elapsed
        count = max(1, len(self._hub.stats().workers))
        # What explorers tell of is a second old, and they come and go.
        self._metrics["idle/workers"] = min(1.0, max(0.0, 1 - workers / elapsed / count))
        self._metrics["idle/env_hosts"] = (
            # A call counts when it ends, so one of before the step may be longer than the step.
            max(0.0, 1 - hosts / elapsed / self._count) if self._hosts else None
        )
        self._metrics["tokens_per_s"] = tokens / elapsed

    def _busy_and_tokens(self) -> tuple[float, float, float]:
        stats = self._hub.stats()
        return (
            sum(worker.busy_s for worker in stats.workers),
            sum(of_set.busy_s for of_set in self._hosts),
            stats.generated_tokens,
        )

    def _write(self, more: Mapping[str, Any]) -> None:
        line = {**more, "time_s": self._clock() - self._began, **self._metrics}
        self._lines.append(line)
        self._metrics = {}
        self._observer.measured(line)


def _value(lines: list[dict[str, Any]], name: str) -> float | None:
    return lines[0][name] if lines else None
