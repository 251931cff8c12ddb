"""What a role runs: `python -m flash.cluster train SETTINGS MARKER`, or `explore …`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flash.cli.main import as_process, log_to_stderr, main
from flash.cluster.hosts import FarHosts
from flash.cluster.ranks import RanksOnNodes
from flash.cluster.roles import HostsAsked
from flash.command_line import ended
from flash.system.durable import write_whole
from flash.trainer.ranks import LocalRanks, RankStarter


def _train(settings: str, marker: str, *others: str) -> None:
    """A run's controller; the marker tells its folder. `others` as of `controller_command`."""
    from flash import config  # noqa: PLC0415  (seconds to import)
    from flash.cli.commands import run_training  # noqa: PLC0415

    loaded = config.load(settings)
    starter: RankStarter | None = None
    if others:
        from flash.cluster.remote import ranks_of  # noqa: PLC0415  (it imports ray)

        cluster, namespace, *names = others
        here = LocalRanks(loaded.explorers.host)
        starter = RanksOnNodes(here, ranks_of(names, cluster, namespace))

    def told(folder: Path) -> None:
        write_whole(Path(marker), str(folder).encode())

    run_training(loaded, opened=told, starter=starter)


def _explore(arguments: Sequence[str], hosts: HostsAsked) -> None:
    """An explorer that has these on other nodes."""
    from flash.cli.commands import run_explorer  # noqa: PLC0415  (seconds to import)
    from flash.cluster.remote import hosts_of  # noqa: PLC0415  (it imports ray)

    of = arguments[arguments.index("--name") + 1]
    run_explorer(arguments, FarHosts(hosts_of(hosts), of=of, count=hosts.count, cpus=hosts.cpus))


def _role(arguments: Sequence[str]) -> None:
    role, *rest = arguments
    if role == "train":
        log_to_stderr()
        as_process(lambda: ended(lambda: _train(*rest)))
    elif (hosts := HostsAsked.told()) is not None:
        log_to_stderr()
        as_process(lambda: ended(lambda: _explore(rest, hosts)))
    else:
        main(arguments)


if __name__ == "__main__":
    _role(sys.argv[1:])
