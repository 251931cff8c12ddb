"""Task folders for tests, of Harbor's form and of terminal-bench's.

The task of each: write how many lines `log.txt` has to `count.txt`.
"""

from pathlib import Path

SOLUTION = "wc -l < log.txt > count.txt"
TEST_SH = """\
#!/bin/bash
if [ "$(cat count.txt)" = "$(cat /tests/right/count.txt)" ]; then reward=1; else reward=0; fi
echo $reward > /logs/verifier/reward.txt
"""
RUN_TESTS_SH = """\
#!/bin/bash
python -m pytest -p no:cacheprovider "$TEST_DIR/test_outputs.py" -rA
"""
TEST_OUTPUTS_PY = """\
from pathlib import Path

def test_the_count_is_there():
    assert Path("count.txt").exists()

def test_the_count_is_right():
    assert Path("count.txt").read_text().strip() == "3"
"""
DOCKERFILE = """\
# What the task is played in.
FROM debian:12-slim
WORKDIR /app
ENV GREETING="good day" PLACE=${GREETING}/here
COPY log.txt .
COPY --chown=root:root data/ /brought/data/
RUN printf 'made in %s' "$PLACE" \\
    # a comment does not end it
    > made.txt
CMD ["bash"]
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def harbor(folder: Path, **changes: str | None) -> Path:
    """`changes`: texts of files, by their names; None leaves one out."""
    files = {
        "task.toml": "[agent]\ntimeout_sec = 60.0\n[verifier]\ntimeout_sec = 20.0\n",
        "instruction.md": "<!-- canary 123 -->\n\nWrite how many lines log.txt has to count.txt.\n",
        "environment/Dockerfile": DOCKERFILE,
        "environment/log.txt": "a\nb\nc\n",
        "environment/data/deep/one.txt": "1",
        "solution/solve.sh": f"#!/bin/bash\n{SOLUTION}\n",
        "tests/test.sh": TEST_SH,
        "tests/right/count.txt": "3\n",
    }
    return write(folder, {k: v for k, v in (files | changes).items() if v is not None})


def terminal_bench(folder: Path, **changes: str | None) -> Path:
    """`changes`: texts of files, by their names; None leaves one out."""
    files = {
        "task.yaml": (
            "# canary 123\ninstruction: |-\n  Write how many lines log.txt has to count.txt.\n"
            "difficulty: easy\nparser_name: pytest\nmax_agent_timeout_sec: 60\n"
        ),
        "Dockerfile": "FROM ghcr.io/laude-institute/t-bench/python-3-13:1\nCOPY log.txt /app/\n",
        "docker-compose.yaml": "services:\n  client:\n    build:\n      dockerfile: Dockerfile\n",
        "log.txt": "a\nb\nc\n",
        "solution.sh": f"#!/bin/bash\n{SOLUTION}\n",
        "run-tests.sh": RUN_TESTS_SH,
        "tests/test_outputs.py": TEST_OUTPUTS_PY,
    }
    return write(folder, {k: v for k, v in (files | changes).items() if v is not None})
