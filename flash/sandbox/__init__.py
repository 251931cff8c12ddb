"""Where code runs that nobody has read: of a policy, of a task, of a tool."""

from flash.sandbox.choose import Kind, check_sandbox, open_sandbox
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
    "Kind",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxUnavailable",
    "Started",
    "check_sandbox",
    "open_sandbox",
]
