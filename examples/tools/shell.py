"""A shell for the policy: `--agent.tools examples.tools.shell:bash --agent.sandbox local`, so that
each episode has files of its own, and none that another has."""

import subprocess


def bash(command: str) -> str:
    """
    Runs a command of bash, in a folder that is kept from one to the next.

    Args:
        command: as typed at a prompt
    """
    done = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return f"{done.stdout.decode(errors='replace')}\n(exit code {done.returncode})".strip()
