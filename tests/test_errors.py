"""What comes out of a group of tasks."""

import asyncio

import pytest

from flash.errors import InferenceFailure, first_error


async def test_out_of_a_group_of_tasks_comes_one_error_with_its_cause():
    async def fail():
        raise InferenceFailure("no worker is left") from OSError("connection refused")

    with pytest.raises(InferenceFailure, match="no worker is left") as caught, first_error():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
    assert repr(caught.value.__cause__) == "OSError('connection refused')"
