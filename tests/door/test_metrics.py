"""What Prometheus reads."""

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from flash.types import Weights

USER = {"role": "user", "content": "hi"}


async def scrape(house) -> dict[tuple[str, ...], float]:
    """Values by name and labels' values."""
    headers = {"Authorization": f"Bearer {house.door.token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(f"{house.door.url}/metrics") as response,
    ):
        assert response.headers["Content-Type"].startswith("text/plain")
        text = await response.text()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_the_numbers_are_the_hubs_and_the_doors(enter, tmp_path):
    async with enter() as house:
        session, client = house.open()
        async with client:
            answer = await client.chat.completions.create(model="policy", messages=[USER])
        session.close()
        await house.hub.publish(Weights(version=3, path=tmp_path))
        numbers = await scrape(house)
    assert numbers["flash_hub_version",] == 3
    assert numbers["flash_hub_requests_total",] == 1
    assert numbers["flash_hub_publishes_total",] == 1
    assert numbers["flash_hub_queued",] == numbers["flash_hub_running",] == 0
    assert numbers["flash_hub_prompt_tokens_total",] == answer.usage.prompt_tokens
    assert numbers["flash_hub_generated_tokens_total",] == answer.usage.completion_tokens
    assert numbers["flash_worker_healthy", "worker"] == 1
    assert numbers["flash_worker_version", "worker"] == 3
    assert numbers["flash_door_generate_seconds_count", "worker"] == 1
    assert numbers["flash_door_generate_seconds_bucket", "+Inf", "worker"] == 1
    route = "/episodes/{token}/v1/chat/completions"
    assert numbers["flash_door_requests_total", route, "200"] == 1


async def test_two_doors_have_numbers_of_their_own(enter):
    async with enter() as one, enter() as other:
        _, client = one.open()
        async with client:
            await client.completions.create(model="policy", prompt="x")
        counted = ("flash_hub_requests_total",)
        assert (await scrape(one))[counted] == 1
        assert (await scrape(other))[counted] == 0
