"""gymnasium's registry: whatever is registered there and speaks in texts."""

from typing import Any

import gymnasium
from gymnasium import spaces


def make(*, id: str, **options: Any) -> gymnasium.Env[str, str]:
    """The environment of that id, made by gymnasium, with its wrappers.

    `id` may be `module:ID`: gymnasium then imports the module that registers it. ValueError if
    there is none, or if its spaces are no texts.
    """
    try:
        env: gymnasium.Env[str, str] = gymnasium.make(id, disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        raise ValueError(
            f"id={id!r} can't be made by gymnasium: {error}: one that a package registers is "
            f"written module:ID"
        ) from error
    for name, space in (
        ("observation_space", env.observation_space),
        ("action_space", env.action_space),
    ):
        if not isinstance(space, spaces.Text):
            raise ValueError(
                f"id={id!r} has {name}={space}: wrap it in an environment of your own that says "
                f"in words what there is to see and reads words as actions"
            )
    return env
