"""What guards a vLLM server's routes, without a vLLM server."""

import pytest

from flash.worker.vllm_extension import RequireKey

KEY = (b"authorization", b"Bearer key")
HERE = (b"host", b"127.0.0.1:8000")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/collective_rpc", [HERE, KEY], 200),
        ("/health", [HERE], 200),
        ("/collective_rpc", [HERE], 401),
        ("/collective_rpc", [HERE, (b"authorization", b"Bearer \xff")], 401),
        ("/collective_rpc", [HERE, KEY, (b"origin", b"https://evil.example")], 403),
        ("/health", [(b"host", b"evil.example")], 403),
    ],
)
async def test_every_route_but_health_asks_for_the_key_and_none_is_for_web_pages(
    path, headers, status, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", "key")
    told = []

    async def app(scope, receive, send):
        told.append(200)

    async def send(message):
        if message["type"] == "http.response.start":
            told.append(message["status"])

    scope = {"type": "http", "path": path, "headers": headers, "server": ("127.0.0.1", 8000)}
    await RequireKey(app)(scope, None, send)
    assert told == [status]
