"""Whole runs of a few small steps, with all parts real."""

import asyncio
import json
from pathlib import Path

from transformers import AutoTokenizer

from flash import config as configuration
from flash.train import train
from flash.warm_start.small_policy import create

TINY = {
    "steps": 3,
    "batch_size": 16,
    "group_size": 4,
    "eval_every": 2,
    "eval.tasks": 8,
    "policy.layers": 1,
    "policy.hidden_size": 32,
    "policy.heads": 2,
    "warm_start.steps": 3,
    "warm_start.demonstrations": 12,
}


OUTCOMES = ("admitted", "running", "ready", "trained", "dropped", "failed", "cancelled")


def tiny(preset: str, runs: Path, *, untaught: bool = False, **changes):
    """A run of a few small steps. Its small policy is that of earlier tests, unless `untaught`."""
    policies = runs / ".small_policies"
    if not untaught and not policies.exists():
        shared = runs.parent / "small_policies"
        shared.mkdir(exist_ok=True)
        policies.symlink_to(shared)
    return configuration.load(preset, {**TINY, "runs_dir": str(runs), **changes})


def questions(folder: Path) -> dict[str, object]:
    """What the preset gsm8k gets from elsewhere: a model that chats, and a file."""
    model = create(folder / "model", map(str, range(10)), layers=1, hidden_size=32, heads=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(model)
    lines = (json.dumps({"question": str(n), "answer": str(n % 10)}) for n in range(60))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return {
        "model": str(model),
        "env.options": {"path": str(folder / "questions.jsonl")},
        "env.eval_options": {"split": "heldout"},
        "agent.max_tokens": 8,
        "rollout.filters": "",
    }


def problems(folder: Path) -> dict[str, object]:
    """What the preset code gets from elsewhere."""
    tests = ({"text": f"Add {n}.", "test_list": [f"assert f(1) == {n + 1}"]} for n in range(60))
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, tests)))
    options = {"path": str(folder / "problems.jsonl")}
    return {**questions(folder), "env.options": options, "env.hosts": 2}


async def run(config, stop=None):
    return await train(config, stop=stop or asyncio.Event())
