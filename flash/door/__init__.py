"""The door: agents that speak OpenAI's protocol act through the hub, and are recorded."""

from flash.door.errors import ApiError
from flash.door.server import Door
from flash.door.session import DoorSession

__all__ = ["ApiError", "Door", "DoorSession"]
