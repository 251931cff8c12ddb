"""Whatever a body holds, it is answered or refused: it never breaks the door."""

import copy
import json
import random

import aiohttp
import pytest

PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
MESSAGES = {
    "model": "policy",
    "system": [{"type": "text", "text": "s"}],
    "thinking": {"type": "disabled"},
    "tools": [{"name": "look", "input_schema": PARAMETERS}],
    "tool_choice": {"type": "auto"},
    "messages": [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "text", "text": "w"},
                {"type": "tool_use", "id": "c", "name": "look", "input": {"at": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c",
                    "content": [{"type": "text", "text": "o"}],
                }
            ],
        },
    ],
}
BODIES = {
    "chat/completions": {
        "model": "policy",
        "n": 1,
        "max_tokens": 5,
        "temperature": 1.0,
        "stop": ["x"],
        "stream": False,
        "tools": [{"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"a": 1},
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": "c",
                "reasoning_content": "r",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "look", "arguments": '{"at": 1}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
        ],
    },
    "completions": {"model": "policy", "prompt": "hi", "max_tokens": 4, "stop": "x", "n": 2},
    "responses": {
        "model": "policy",
        "instructions": "i",
        "max_output_tokens": 6,
        "tools": [{"type": "function", "name": "look", "parameters": PARAMETERS}],
        "text": {"format": {"type": "text"}},
        "input": [
            {"role": "user", "content": "q"},
            {
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "t"}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "w"}],
            },
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "o"},
        ],
    },
    "messages": {**MESSAGES, "max_tokens": 6, "stop_sequences": ["x"], "temperature": 1.0},
    "messages/count_tokens": MESSAGES,
}
DEEP = "[" * 600 + "]" * 600
ODD = [
    None, True, 0, -1, 1.5, 1e308, 2**70, "", "x", "\ud800", "\x00", "a" * 2000, DEEP,
    [], {}, [[]], [{}], [None], [1, 2], {"a": {"b": []}}, {"type": []}, {"type": {}},
    {"type": "text"}, {"type": "text", "text": "\ud83d"}, {"type": "image_url"},
    {"type": "item_reference", "id": "x"}, {"role": "assistant", "content": "y"},
]  # fmt: skip
NAMES = ["extra", "type", "role", "content", "tools", "name", "id", "strict", "cache_control"]


def places(value, path=()):
    """Where something is in it, but for itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, each in inner:
        yield (*path, name)
        if isinstance(each, dict | list):
            yield from places(each, (*path, name))


def changed(body, chance):
    body = copy.deepcopy(body)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        *path, last = chance.choice(list(places(body)) or [("model",)])
        holder = body
        for name in path:
            holder = holder[name]
        how = chance.random()
        if how < 0.15:
            holder.pop(last, None) if isinstance(holder, dict) else holder.pop(last)
        elif how < 0.3 and isinstance(holder, dict):
            holder[chance.choice(NAMES)] = copy.deepcopy(chance.choice(ODD))
        else:
            holder[last] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(body).replace(json.dumps(DEEP), DEEP)


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("ignore", [(), ("*",)])
async def test_whatever_a_body_holds_is_answered_or_refused(enter, route, ignore):
    chance = random.Random(f"{route} {ignore}")
    statuses = set()
    options = {"ignore": ignore, "requests_per_s": 1e6}
    async with enter(**options) as house, aiohttp.ClientSession() as http:
        session, _ = house.open()
        headers = {"Authorization": f"Bearer {session.api_key}"}
        for _ in range(80):
            body = changed(BODIES[route], chance)
            async with http.post(
                f"{session.base_url}/{route}", data=body, headers=headers
            ) as response:
                told = await response.text()
                assert response.status in (200, 400, 404), (body, told)
                assert response.status == 200 or json.loads(told)["error"]["message"], body
                statuses.add(response.status)
    assert statuses >= {200, 400}


@pytest.mark.parametrize(
    ("route", "body", "told"),
    [
        ("chat/completions", f'{{"messages": [{DEEP}]}}', "deeper than 100 levels"),
        ("responses", '{"model": "policy", "input": [{"type": []}]}', "input[0].type=[]"),
    ],
)
async def test_what_once_broke_it_is_refused(enter, route, body, told):
    async with enter() as house, aiohttp.ClientSession() as http:
        session, _ = house.open()
        headers = {"Authorization": f"Bearer {session.api_key}"}
        async with http.post(f"{session.base_url}/{route}", data=body, headers=headers) as response:
            assert response.status == 400
            assert told in (await response.json())["error"]["message"]
