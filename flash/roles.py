"""One of several who play an episode: who answers it, and what it is worth to it."""

from dataclasses import dataclass, field

from flash.types import Generate


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """A model at a URL such as https://host/v1, of OpenAI's protocol."""

    url: str
    model: str
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """By default the episode's policy, which is trained.

    `generate` answers in its place, or a model that is `elsewhere`; what these say is not trained
    on. `share` is of the episode's reward, where the agent answers none for this role.
    """

    share: float = 1.0
    generate: Generate | None = None
    elsewhere: Elsewhere | None = None

    @property
    def learns(self) -> bool:
        return self.generate is None and self.elsewhere is None
