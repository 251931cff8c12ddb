"""The EnvironmentAgent actor and its prompt styles; installs as `flash.agents`."""

from .actor import Actor
from .chat import ChatStyle
from .environment_agent import EnvironmentAgent
from .external import ExternalAgent
from .plain import PlainStyle

__all__ = ["Actor", "ChatStyle", "EnvironmentAgent", "ExternalAgent", "PlainStyle"]
