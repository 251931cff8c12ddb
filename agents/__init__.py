"""The EnvironmentAgent actor and its prompt styles; installs as `flash.agents`."""

from .chat import ChatStyle
from .environment_agent import EnvironmentAgent
from .external import ExternalAgent
from .plain import PlainStyle

__all__ = ["ChatStyle", "EnvironmentAgent", "ExternalAgent", "PlainStyle"]
