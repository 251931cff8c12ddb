"""Where code runs that nobody has read: of a policy, of a task, of a tool."""

from flash.sandbox.choose import open_sandbox
from flash.sandbox.sandbox import (
    WORK,
    FileFailure,
    Limits,
    Outcome,
    Sandbox,
    SandboxUnavailable,
    Started,
)

__all__ = [
    "WORK",
    "FileFailure",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxUnavailable",
    "Started",
    "open_sandbox",
]
