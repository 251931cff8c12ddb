"""One of several who play an episode: who answers it, and what it is worth to it."""

from dataclasses import dataclass

from flash.door.elsewhere import Elsewhere
from flash.door.session import Generate


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
