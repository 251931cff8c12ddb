"""Keys of GeRL (leibniz-csi/mm_grpo): verl's, and those of images that a diffusion model makes."""

from flash.convert.counterparts import no_environment
from flash.convert.rules import (
    Answer,
    Becomes,
    Given,
    Missing,
    NoMeaning,
    Placeholder,
    Rule,
    System,
)
from flash.convert.verl import ACTOR, DEFAULTS, ROLLOUT, RULES, alpha

_IMAGES = "policies here say words: no worker makes images"


def _strategy(given: Given) -> Answer:
    """naive: apart from the trainer, one after the other."""
    if given.value not in ("one-step-off", "naive"):
        return Missing(f"{given.value}: there are one-step-off and naive; alpha may be any here")
    return {"alpha": alpha(given.source), "rollout.schedule": "batch"}


def _model(given: Given) -> Answer:
    return Missing(f"{given.value}: {_IMAGES}; name a language model as model")


def _images(given: Given) -> Placeholder:
    return no_environment(f"{given.value}: {_IMAGES}")


_OWN: dict[str, Rule] = {
    "actor_rollout_ref.async_strategy": Becomes(
        ("alpha", "rollout.schedule"),
        "one-step-off: a batch is sampled while the one before is trained, alpha 1; naive: 0",
        _strategy,
    ),
    f"{ROLLOUT}with_reward": NoMeaning("generation never waits for rewards, one by one"),
    f"{ROLLOUT}name": Missing(_IMAGES),
    "actor_rollout_ref.model.path": Becomes((), "a diffusion model", _model),
    "actor_rollout_ref.model.tokenizer_path": Missing(_IMAGES),
    f"{ROLLOUT}image_*": Missing(_IMAGES),
    f"{ROLLOUT}num_inference_steps": Missing(_IMAGES),
    f"{ROLLOUT}noise_level": Missing(_IMAGES),
    f"{ROLLOUT}guidance_scale": Missing(_IMAGES),
    f"{ROLLOUT}sde_*": Missing(_IMAGES),
    f"{ROLLOUT}val_kwargs.*": Missing(_IMAGES),
    f"{ROLLOUT}true_cfg_scale": Missing(_IMAGES),
    f"{ACTOR}policy_loss.loss_mode": Missing(f"the clip is of denoising steps: {_IMAGES}"),
    f"{ACTOR}clip_ratio*": Missing(f"the clip is of denoising steps: {_IMAGES}"),
    f"{ACTOR}fsdp_config.*dtype": Missing(_IMAGES),
    "algorithm.global_std": Missing("advantages are by group; whiten is over the batch"),
    "algorithm.adv_clip_max": Missing("trainer.advantages.clip"),
    "data.data_source": Becomes(("env.name",), "what is drawn", _images),
    "data.reward_fn": Missing("rewards of images: reward.name=process takes texts"),
    "data.train_files": Missing(f"prompts of images: {_IMAGES}"),
}

GERL = System(
    name="gerl",
    title="GeRL",
    signs=(
        "actor_rollout_ref.async_strategy", f"{ROLLOUT}with_reward", f"{ROLLOUT}sde_*",
        f"{ROLLOUT}noise_level", f"{ROLLOUT}guidance_scale", "data.reward_fn", "data.data_source",
    ),
    rules={**_OWN, **RULES, **_OWN},  # its own come first, and count
    defaults=DEFAULTS,
    values={f"{ROLLOUT}n": 8, "algorithm.adv_estimator": "flow_grpo"},
)  # fmt: skip
