"""How our commands end: one line and an exit code, whatever stopped them."""

import errno
import os
import subprocess
import sys

import pytest

from flash.command_line import ended
from flash.errors import RolloutStall, TrainerFailure
from flash.system.machine import remedy

ROOM = remedy(os.strerror(errno.ENOSPC))
FULL = f"OSError: [Errno 28] No space left on device: {ROOM}"
CHILD = """trainer rank 0 raised:
Traceback (most recent call last):
  File "rank.py", line 3, in save
    write(path)
    ~~~~~^^^^^^
  File "torch.py", line 9, in write
    raise
{said}
"""


def fails(error: BaseException):
    def command() -> None:
        raise error

    return command


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "runs/x/metrics.jsonl")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("steps=0: must be at least 1"), 2, "steps=0: must be at least 1"),
        (os_error(errno.ENOSPC), 1, "OSError: [Errno 28] No space left on device: "
         f"'runs/x/metrics.jsonl': {ROOM}"),
        (os_error(errno.EMFILE), 1, "OSError: [Errno 24] Too many open files: "
         "'runs/x/metrics.jsonl': allow more open files (ulimit -n 65536), or take fewer "
         "engine.workers, env.hosts and engine.max_running"),
        (os_error(errno.EACCES), 1, "PermissionError: [Errno 13] Permission denied: "
         "'runs/x/metrics.jsonl': give yourself the right to it, or name another place "
         "(runs_dir, --out)"),
        (os_error(errno.ENOENT), 1, "FileNotFoundError: [Errno 2] No such file or directory: "
         "'runs/x/metrics.jsonl': see that it is there, and that nobody removes it under a run"),
        (MemoryError(), 1, "MemoryError: take fewer engine.workers, trainer.ranks and env.hosts, "
         "or a smaller batch_size"),
        (TrainerFailure("it died"), 1, "TrainerFailure: it died"),
        (TrainerFailure(CHILD.format(said="OSError: [Errno 28] No space left on device")), 1,
         f"TrainerFailure: trainer rank 0 raised: {FULL}"),
        (TrainerFailure(CHILD.format(said="IoError: No space left on device (os error 28)")), 1,
         "TrainerFailure: trainer rank 0 raised: IoError: No space left on device (os error 28): "
         f"{ROOM}"),
        (RuntimeError("write failed: No space left on device (os error 28)"), 1,
         f"RuntimeError: write failed: No space left on device (os error 28): {ROOM}"),
        (RolloutStall("asleep", "nothing moves"), 3, "RolloutStall: nothing moves"),
        (ExceptionGroup("tasks", [ExceptionGroup("of one", [os_error(errno.ENOSPC)])]), 1,
         f"OSError: [Errno 28] No space left on device: 'runs/x/metrics.jsonl': {ROOM}"),
    ],
)  # fmt: skip
def test_a_failure_ends_in_a_line_with_its_remedy_and_an_exit_code(error, code, line, capsys):
    assert ended(fails(error)) == code
    assert capsys.readouterr().err == f"flash: {line}\n"


def test_what_was_noted_about_a_group_is_told_of_its_cause(capsys):
    group = ExceptionGroup("tasks", [TrainerFailure("it died")])
    group.add_note("more in controller.log")
    assert ended(fails(group)) == 1
    assert (
        capsys.readouterr().err == "flash: TrainerFailure: it died\nflash: more in controller.log\n"
    )


def test_ctrl_c_is_quiet(capsys):
    assert ended(fails(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError):
        ended(fails(KeyError("ours")))


def test_a_full_disk_is_told_where_to_write_instead():
    assert "make room on that disk, or write elsewhere (runs_dir, --out, $TMPDIR)" in ROOM


def test_an_error_of_no_machine_has_no_remedy():
    assert remedy("TrainerFailure: the loss is nan") == ""


def run(shell: str) -> subprocess.CompletedProcess[str]:
    flash = f"{sys.executable} -c 'from flash.cli.main import main; main()'"
    return subprocess.run(
        ["bash", "-c", shell.replace("FLASH", flash)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("FLASH --help >/dev/full", 1, f"flash: {FULL}\n"),
        ("FLASH --help >&-", 0, ""),
        ("FLASH train --help | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("PYTHONIOENCODING=ascii FLASH --help", 0, ""),
    ],
)  # fmt: skip
def test_an_output_that_takes_nothing_more_is_no_traceback(shell, code, said):
    done = run(shell)
    assert done.stderr == said
    assert done.returncode == code


@pytest.mark.parametrize("module", ["flash.environments.host", "flash.reward.host"])
def test_a_process_that_only_a_run_starts_says_so(module):
    done = run(f"{sys.executable} -m {module}")
    said = "flash: this process is started by flash train and flash eval: use these\n"
    assert done.stderr == said
    assert done.returncode == 1


def test_the_report_of_a_run_that_is_none_is_one_line():
    done = run(f"{sys.executable} -m flash.telemetry.report nowhere")
    assert done.stderr == "flash: nowhere holds no metrics.jsonl: give the folder of a run\n"
    assert done.returncode == 2
