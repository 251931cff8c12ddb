"""The network between hosts on one machine, which other tests believe in."""

import asyncio
import os
import signal
import sys

import pytest

from tests.commands import started
from tests.hosts.network import Network, Weather, unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

PORT = 9000
LISTENS = f"""
import socket
with socket.create_server(("", {PORT})) as server:
    print("listens", flush=True)
    connection, (address, _) = server.accept()
    got = b"".join(iter(lambda: connection.recv(65536), b""))
    connection.close()
print(address, len(got), sum(got))
"""
SENDS = f"""
import socket, sys
with socket.create_connection((sys.argv[1], {PORT})) as connection:
    connection.sendall(bytes([1]) * 100_000)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""
print("sent")
"""
LOOKS = "import os, socket, sys; print(socket.gethostname(), os.listdir(sys.argv[1]))"


@pytest.fixture(autouse=True)
def _hosts():
    if why := unavailable():
        pytest.skip(why)


async def output(process) -> str:
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode().strip()


async def test_what_is_sent_arrives_whole_in_any_weather():
    weather = Weather(loss=0.05, delay_s=0.001, jitter_s=0.002, doubled=0.1, reordered=0.1)
    async with Network(weather) as network:
        a, b = await network.add("a"), await network.add("b")
        async with started(sys.executable, "-c", LISTENS, inside=b.inside) as listens:
            await listens.stdout.readline()
            async with started(sys.executable, "-c", SENDS, b.address, inside=a.inside) as sends:
                assert await output(sends) == "sent"
            assert await output(listens) == f"{a.address} 100000 100000"
        assert {"lost", "doubled", "reordered"} <= network.counts.keys()


async def test_a_host_that_is_cut_off_is_reached_again_when_it_has_joined():
    async with Network(Weather()) as network:
        a, b = await network.add("a"), await network.add("b")
        async with started(sys.executable, "-c", LISTENS, inside=b.inside) as listens:
            await listens.stdout.readline()
            network.cut_off(b)
            async with started(sys.executable, "-c", SENDS, b.address, inside=a.inside) as sends:
                while network.counts["cut off"] < 2:  # of the same packet: it is sent again
                    await asyncio.sleep(0.01)
                assert sends.returncode is None
                network.join(b)
                assert await output(sends) == "sent"


async def test_a_host_has_its_own_name_and_none_of_a_hidden_folder_and_ends_with_the_network(
    tmp_path,
):
    (tmp_path / "file").touch()
    async with Network(Weather()) as network:
        a, b = await network.add("a", hidden=(tmp_path,)), await network.add("b")
        for host, seen in ((a, "a []"), (b, "b ['file']")):
            async with started(sys.executable, "-c", LOOKS, tmp_path, inside=host.inside) as looks:
                assert await output(looks) == seen
        processes = [os.pidfd_open(host.process) for host in (a, b)]
    for process in processes:
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(process, 0)
        os.close(process)
