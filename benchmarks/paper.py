"""Published speed-ups of ROLL Flash (arXiv 2510.11345) beside what the simulator says.

The paper does not give every setting; what is assumed here is printed with each claim. Not tried:
what rests on redundant rollouts, which the engine does not have yet, and prompt replication, whose
gain rests on how alike a prompt's responses are, which is not published.

    python benchmarks/paper.py
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from flash.simulate import Scenario, simulate
from flash.simulate.hardware import on_hardware
from flash.simulate.world import World

RESULTS = Path(__file__).parent / "results" / "paper.json"


@dataclass(frozen=True)
class Claim:
    """A figure of the paper, and ours."""

    what: str
    published: float
    ours: float
    assumed: str


def environment_asynchrony() -> Iterator[Claim]:
    """Every turn of a batch waits for its slowest environment, or none waits for another."""
    for envs, turns in ((128, 30), (128, 50), (512, 30)):
        scenario = Scenario(
            steps=1, alpha=0, batch_size=envs, group_size=8, grain=20,
            workers={"count": 8, "max_running": 128, "step_s": 0.02},
            workload={
                "turns": turns, "prompt_tokens": 1, "response_tokens": 100,
                "env_step_s": {"kind": "normal", "mean": 10, "std": 10},
            },
        )  # fmt: skip
        free = simulate(scenario).time_s
        world = World(scenario)
        scripts = [world.begin(task) for task in range(envs // 8) for _ in range(8)]
        generate_s = 100 * 0.02
        lockstep = sum(
            generate_s + max(script.step_s[turn] for script in scripts) for turn in range(turns)
        )
        yield Claim(
            "environment-level asynchrony, steps of N(10, 10) s", 2.46, lockstep / free,
            f"{envs} environments, {turns} turns, 100 tokens a turn at 50 tokens/s",
        )  # fmt: skip


def rollout_train_decoupling() -> Iterator[Claim]:
    """40 GPUs that roll out and then train, against 24 that roll out and 16 that train."""
    base = on_hardware(
        Scenario(
            steps=12, batch_size=256, group_size=16, max_tokens=32_768, grain=256,
            workers={"max_running": 128},
            workload={
                "prompt_tokens": 512,
                "response_tokens": {
                    "kind": "lognormal", "mean": 10_000, "sigma": 0.8, "at_most": 32_768,
                },
            },
        ),
        "8e9", "h100", keep=["workers.max_running"],
    )  # fmt: skip
    whole = {"workers.count": 40, "trainer.gpus": 40, "alpha": 0}
    split = {"workers.count": 24, "trainer.gpus": 16}
    steps = simulate(base.changed(whole)).steps
    # "Over 70%" of the time is rollout. With 70% the split could bring 1.33 at most, because 16
    # GPUs train as long as 40 do in 30% of a step, times 2.5; so the 2 tells that it was more.
    for share in (0.7, 0.8, 0.9):
        train_s = fmean(step.wait_s for step in steps) * (1 - share) / share - base.trainer.batch_s
        token_gpu_s = train_s * 40 / fmean(step.tokens for step in steps)
        job = base.changed({"trainer.token_gpu_s": token_gpu_s})
        assumed = (
            f"8e9 parameters, H100, batch 256 in groups of 16, lognormal lengths of mean 10k, "
            f"σ 0.8, at most 32k; rollout is {share:.0%} of a synchronous step"
        )
        sync = simulate(job.changed(whole)).samples_per_s
        speeds = {
            alpha: simulate(
                job.changed({**split, "alpha": alpha, "steps": 8 + 4 * alpha})
            ).samples_per_s
            for alpha in (1, 2, 4, 8)
        }
        yield Claim("40 GPUs, 24 roll out and 16 train, α = 2", 2.0, speeds[2] / sync, assumed)
        enough = min(a for a, speed in speeds.items() if speed >= 0.95 * max(speeds.values()))
        yield Claim("smallest α with nearly all of the gain (95%)", 2, enough, assumed)


def main() -> None:
    claims = []
    print(f"{'published':>9} {'ours':>6} {'':>6}  claim: what is assumed")
    for study in (environment_asynchrony, rollout_train_decoupling):
        for claim in study():
            claims.append(claim)
            off = claim.ours / claim.published - 1
            print(
                f"{claim.published:9.2f} {claim.ours:6.2f} {off:+6.0%}  "
                f"{claim.what}: {claim.assumed}",
                flush=True,
            )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([asdict(claim) for claim in claims], indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
