"""The reward stage of a configuration."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from flash import registry
from flash.config import Config
from flash.hub.hub import InferenceHub
from flash.reward.config import EnvReward, FunctionReward, ProcessReward
from flash.reward.judge import Judge, ask_hub, ask_url
from flash.reward.processes import RewardProcesses
from flash.reward.prompt import PROMPT
from flash.reward.stage import FunctionScorer, RewardStage, Scorer
from flash.section import revealed
from flash.system.process import Child, StartProcess


@contextlib.asynccontextmanager
async def open_reward(
    config: Config,
    hub: InferenceHub,
    *,
    tokenizer: Any,
    log_dir: Path,
    start: StartProcess = Child.start,
) -> AsyncIterator[RewardStage | None]:
    """The reward stage, if the reward is not the environment's own. `start`: of its processes."""
    reward = config.reward
    if isinstance(reward, EnvReward):
        yield None
        return
    async with contextlib.AsyncExitStack() as parts:
        scorer: Scorer
        if isinstance(reward, FunctionReward):
            scorer = FunctionScorer(registry.function(reward.run, "reward.run"))
        elif isinstance(reward, ProcessReward):
            scorer = await parts.enter_async_context(
                RewardProcesses(
                    reward.run, processes=reward.concurrency, log_dir=log_dir, start=start
                )
            )
        else:
            if reward.url:
                ask = ask_url(
                    await parts.enter_async_context(aiohttp.ClientSession()),
                    reward.url,
                    model=reward.model,
                    api_key=revealed(reward.api_key),
                    max_tokens=reward.max_tokens,
                )
            elif getattr(tokenizer, "chat_template", None):
                ask = ask_hub(hub, tokenizer, max_tokens=reward.max_tokens)
            else:
                raise ValueError(
                    f"model={config.model!r} has no chat template, so it can't judge (reward.name="
                    f"judge): use an instruction-tuned model, or another's reward.url"
                )
            scorer = Judge(ask, prompt=reward.prompt or PROMPT, max_score=reward.max_score)
        yield RewardStage(
            scorer,
            decode=tokenizer.decode,
            concurrency=reward.concurrency,
            timeout_s=reward.timeout_s,
            retries=reward.retries,
        )
