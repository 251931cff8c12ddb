"""From a real run's folder to the scenario that simulates it.

What a run tells of itself, and what is fitted to it:

- `episodes.jsonl`: each episode's turns, tokens and seconds, which are played again as they were;
- `metrics.jsonl`: the trainer's and the publishes' seconds; a batch's take a part that its tokens
  decide, if that part can be seen;
- the seconds that episodes spent in `generate`: the workers' times, by simulating the run until the
  simulated seconds are the measured ones. So queueing at the hub is not taken for slow workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash.config import validated
from flash.config.source import read_mapping
from flash.hub.waves import loads_in_a_row
from flash.rollout.filters import FILTERS
from flash.simulate.replay import RecordedEpisode, played
from flash.simulate.run import simulate
from flash.simulate.scenario import NOT_SIMULATED, Scenario
from flash.telemetry.folder import read_lines

_AS_IN_THE_RUN = ("alpha", "batch_size", "group_size", "publish_every", "stream")
_MEASURED = (
    "step", "time/train_s", "time/wait_batch_s", "time/publish_s", "publish/paused_s",
    "publish/count",
)  # fmt: skip
_ROUNDS = 5
_CLOSE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A run and the scenario that stands for it. Times leave out evaluations."""

    scenario: Scenario
    measured_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        """By how much the simulation is too slow, as a share."""
        return self.simulated_s / self.measured_s - 1


def calibrate(run: Path) -> Calibration:
    """ValueError for a folder that holds no run with at least two steps."""
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if all(isinstance(line.get(n), int | float) for n in _MEASURED)]
    if len(steps) < 2:
        raise ValueError(
            f"{run}/metrics.jsonl holds {len(steps)} steps, and the fit needs two: name the folder "
            f"of a run that trained"
        )
    settings = _configured(run / "config.yaml")
    workers, max_running = settings["workers"]["count"], settings["workers"]["max_running"]
    episodes = played(run)
    prompt, observation = _prompt_tokens(episodes)
    load_s, export_s = _publish_s(steps, workers)
    batch_s, token_s = _train_s(steps, episodes, prompt=prompt, observation=observation)
    overhead_s, step_s, request_s = _worker_s(episodes, workers=workers, max_running=max_running)
    settings |= {"name": f"{run.name}_calibrated", "steps": len(steps)}
    settings["workers"] |= {
        "overhead_s": overhead_s, "step_s": step_s, "request_s": request_s, "load_s": load_s,
    }  # fmt: skip
    settings["trainer"] = {"batch_s": batch_s, "token_gpu_s": token_s, "export_s": export_s}
    settings["workload"] |= {
        "replay": str(run),
        "prompt_tokens": round(prompt),
        "observation_tokens": round(observation),
    }
    measured_generate_s = _generate_s(episodes)
    for _ in range(_ROUNDS):
        scenario = validated(Scenario, settings)
        result = simulate(scenario)
        trained = [e.stages_s.get("generate", 0.0) for e in result.episodes if e.reward is not None]
        ratio = measured_generate_s / fmean(trained)
        if abs(ratio - 1) < _CLOSE:
            break
        for name in ("overhead_s", "step_s", "request_s"):
            settings["workers"][name] *= ratio
    return Calibration(
        scenario=scenario,
        measured_s=sum(
            line["time/wait_batch_s"] + line["time/train_s"] + line["time/publish_s"]
            for line in steps
        ),
        simulated_s=result.steps[-1].time_s,
    )


def _configured(path: Path) -> dict[str, Any]:
    """What of the scenario the run's configuration decides. ValueError where a field is missing."""
    config = read_mapping(path, "env: NAME")
    try:
        engine, agent, rollout = config["engine"], config["agent"], config["rollout"]
        # One of the user's own would look into tokens, of which a replay has only the number.
        filters = [name for name in rollout["filters"] if name in FILTERS]
        rollout = {name: value for name, value in rollout.items() if name not in NOT_SIMULATED}
        return {name: config[name] for name in _AS_IN_THE_RUN} | {
            "rollout": rollout | {"filters": filters},
            "max_tokens": agent["max_tokens"],
            "max_sequence_tokens": agent["max_sequence_tokens"],
            "workers": {
                "count": len(engine["urls"]) or engine["workers"],
                "max_running": engine["max_running"],
                "kv_tokens": engine["cache_tokens"],
                "update_mode": engine["update_mode"],
            },
            "workload": {"step_timeout_s": agent["step_timeout_s"]},
        }
    except KeyError as missing:
        raise ValueError(
            f"{path} has no {missing}: name a folder that a run of this version made"
        ) from missing
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no run's ({error}): name a folder that a run of this version made"
        ) from error


def _generate_s(episodes: Sequence[RecordedEpisode]) -> float:
    return fmean(episode.generate_s for episode in episodes)


def _prompt_tokens(episodes: Sequence[RecordedEpisode]) -> tuple[float, float]:
    """Tokens of the first prompt, and between two responses.

    A turn's prompt holds all before it. So of T turns the prompts sum up to T first prompts, and
    the first response is in T-1 of them, the second in T-2, …, like the observations.
    """
    turns = np.array([e.turns for e in episodes], dtype=np.float64)
    pairs = turns * (turns - 1) / 2
    responses = np.array([e.generated_tokens for e in episodes]) / turns
    prompts = np.array([e.prompt_tokens for e in episodes])
    first, between = _least_squares(np.stack([turns, pairs], 1), prompts - responses * pairs)
    return max(1.0, first), between


def _publish_s(steps: Sequence[dict[str, Any]], workers: int) -> tuple[float, float]:
    """Of one worker's load, and of what comes before the workers' loads."""
    paused_s, count = steps[-1]["publish/paused_s"], steps[-1]["publish/count"]
    load_s = paused_s / max(1, count) / workers
    before = [0, *(line["publish/count"] for line in steps)]
    published = [s for s, n in zip(steps, before, strict=False) if s["publish/count"] != n]
    publish_s = fmean(line["time/publish_s"] for line in published or steps)
    return load_s, max(0.0, publish_s - load_s * loads_in_a_row(workers))


def _train_s(
    steps: Sequence[dict[str, Any]],
    episodes: Sequence[RecordedEpisode],
    *,
    prompt: float,
    observation: float,
) -> tuple[float, float]:
    """Of a batch, and of each of its tokens more."""
    tokens: dict[int, float] = {}
    for e in episodes:
        if e.trained_at is not None:
            sequence = prompt + e.generated_tokens + observation * (e.turns - 1)
            tokens[e.trained_at] = tokens.get(e.trained_at, 0.0) + sequence
    # The batch that makes version v+1 is trained at version v.
    known = [(tokens[line["step"] - 1], line["time/train_s"]) for line in steps
             if line["step"] - 1 in tokens]  # fmt: skip
    if not known:
        return fmean(line["time/train_s"] for line in steps), 0.0
    sizes, seconds = np.array(known).T
    fit = _least_squares(np.stack([np.ones_like(sizes), sizes], 1), seconds)
    # What the fit leaves over on average goes to the batch, so that the run's total is kept.
    return float(max(0.0, seconds.mean() - fit[1] * sizes.mean())), fit[1]


def _worker_s(
    episodes: Sequence[RecordedEpisode], *, workers: int, max_running: int
) -> tuple[float, float, float]:
    """A first guess of overhead_s, step_s, request_s, from how episodes' seconds in `generate`
    go with their turns, their tokens, and how many others there were."""
    alongside = _alongside(episodes) / workers
    # Those beyond `max_running` wait at the hub, and take no part in a step.
    queueing = np.maximum(1.0, alongside / max_running)
    turns = np.array([e.turns for e in episodes], dtype=np.float64)
    tokens = np.array([e.generated_tokens for e in episodes], dtype=np.float64)
    seconds = np.array([e.generate_s for e in episodes]) / queueing
    columns = np.stack([turns, tokens, tokens * np.minimum(alongside, max_running)], 1)
    overhead_s, step_s, request_s = _least_squares(columns, seconds)
    if step_s + request_s == 0:
        step_s = float(seconds.sum() / tokens.sum())
    return overhead_s, step_s, request_s


def _alongside(episodes: Sequence[RecordedEpisode]) -> NDArray[np.float64]:
    """For each episode, how many were in `generate` at a time while it lived, on average.

    When an episode was in which stage is not recorded: each counts as spread over its life.
    """
    began = np.array([e.admitted_s for e in episodes])
    ended = np.maximum(np.array([e.ended_s for e in episodes]), began + 1e-9)
    share = np.array([e.generate_s for e in episodes]) / (ended - began)
    overlap = np.minimum(ended[:, None], ended) - np.maximum(began[:, None], began)
    return np.asarray((np.maximum(overlap, 0.0) * share).sum(1) / (ended - began))


def _least_squares(columns: NDArray[Any], wanted: NDArray[Any]) -> list[float]:
    """The best factors of the columns, none below 0: those that would be are left out."""
    kept = list(range(columns.shape[1]))
    factors = [0.0] * len(kept)
    while kept:
        fit = np.linalg.lstsq(columns[:, kept], wanted, rcond=None)[0]
        if (fit >= 0).all():
            for index, factor in zip(kept, fit, strict=True):
                factors[index] = float(factor)
            break
        del kept[int(fit.argmin())]
    return factors
