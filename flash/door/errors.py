"""Answers of the door other than 200."""

import json
from collections.abc import Mapping
from typing import Any

LEAVE_OUT = "leave it out, or have the door ignore it (agent.ignore)"


class ApiError(Exception):
    """An answer other than 200. `param` is the field at fault, `details` are for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.details = details


def refused(field: str, value: Any, why: str) -> ApiError:
    """A field's value that can't be honoured; `why` holds the remedy."""
    told = json.dumps(value)
    told = told if len(told) <= 80 else told[:77] + "..."
    return ApiError(400, f"{field}={told}: {why}", code="unsupported_value", param=field)
