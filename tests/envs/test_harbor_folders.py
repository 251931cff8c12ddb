"""What is read of task folders, and which are refused, before any sandbox is opened."""

import pytest

from flash.config import try_environment
from flash.environments.config import EnvConfig
from flash.envs.harbor import HarborEnv
from flash.envs.harbor.build import writable_folders
from flash.envs.harbor.dockerfile import Copy, Run, reaches_out, read_dockerfile
from flash.envs.harbor.folder import read_folder
from tests import task_folders

TOML = "task.toml"
DOCKERFILE = "environment/Dockerfile"


def test_what_harbor_s_folder_says_of_its_task(tmp_path):
    toml = """
        version = "1.0"
        source = "a data set"
        artifacts = ["/app/count.txt"]
        [metadata]
        difficulty = "easy"
        [agent]
        timeout_sec = 12.5
        [verifier]
        timeout_sec = 3
        env = {A = "a"}
        [environment]
        build_timeout_sec = 7.0
        workdir = "/opt/it"
        memory = "1.5G"
        storage_mb = 100
        cpus = 2
        gpus = 0
        allow_internet = true
        mcp_servers = []
        env = {B = "b"}
        [solution.env]
    """
    task = read_folder(task_folders.harbor(tmp_path / "count", **{TOML: toml}))
    assert (task.name, task.folder) == ("count", "/opt/it")
    assert task.instruction == "Write how many lines log.txt has to count.txt."
    assert (task.agent_s, task.verifier_s, task.build_s) == (12.5, 3.0, 7.0)
    assert (task.memory_mb, task.disk_mb) == (1536, 100)
    assert task.env == {"GREETING": "good day", "PLACE": "good day/here", "B": "b"}
    assert task.verifier_env == {"A": "a"}
    assert task.needs == {"image": "FROM debian:12-slim"}
    assert {"/opt", "/app", "/brought", "/tests", "/logs", "/root"} <= set(writable_folders(task))


def test_what_terminal_bench_s_folder_says_of_its_task(tmp_path):
    task = read_folder(task_folders.terminal_bench(tmp_path / "count"))
    assert task.instruction == "Write how many lines log.txt has to count.txt."
    assert (task.folder, task.env, task.marking) == (
        "/app",
        {"TEST_DIR": "/tests"},
        "pytest summary",
    )
    assert (task.agent_s, task.verifier_s) == (60.0, 60.0)


def test_a_dockerfile_is_followed_in_its_order(tmp_path):
    task_folders.write(tmp_path, {"a.txt": "", "b.txt": "", "sub/c": "", "My File": "", "d.py": ""})
    (tmp_path / "Dockerfile").write_text(
        "# syntax=docker/dockerfile:1\n"
        "ARG WHERE=/data\n"
        "FROM debian AS base\n"
        "ENV PATH=/opt/bin:$PATH A=1 \\\n  B='two words'\n"
        "ENV OLD the rest $A\n"
        "WORKDIR $WHERE/${DEEP:-deep}\n"
        "WORKDIR er\n"
        "COPY *.txt d.py ./\n"
        "ADD sub ../sub\n"
        'COPY ["My File", "/srv/your file"]\n'
        'SHELL ["/bin/bash", "-ec"]\n'
        "RUN echo one && \\\n\n  # not this\n  echo \\$A\n"
        'RUN ["echo", "two"]\n'
        "LABEL a=b\nEXPOSE 80\nUSER root\nCMD sleep 1\n"
    )
    recipe = read_dockerfile(tmp_path / "Dockerfile", tmp_path)
    assert recipe.folder == "/data/deep/er"
    assert recipe.env == {"A": "1", "B": "two words", "OLD": "the rest 1"}
    assert recipe.needs == {"image": "FROM debian AS base"}
    copies = [step for step in recipe.steps if isinstance(step, Copy)]
    assert [(sorted(p.name for p in c.sources), c.folder, c.name) for c in copies] == [
        (["a.txt", "b.txt", "d.py"], "/data/deep/er", None),
        (["sub"], "/data/deep/sub", None),
        (["My File"], "/srv", "your file"),
    ]
    runs = [step for step in recipe.steps if isinstance(step, Run)]
    assert [run.argv for run in runs] == [
        ("/bin/mkdir", "-p", "/data/deep"),
        ("/bin/mkdir", "-p", "/data/deep/er"),
        ("/bin/bash", "-ec", "echo one &&   echo \\$A"),
        ("echo", "two"),
    ]
    assert runs[-1].folder == "/data/deep/er"
    assert runs[-1].env == {**recipe.env, "WHERE": "/data"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({TOML: "[agent"}, "task.toml is no TOML"),
        ({TOML: "[agent]\ntimeout_sec = 0"}, "agent.timeout_sec=0: .*greater than 0"),
        ({TOML: '[verifier]\ntimeout_sec = "long"'}, "verifier.timeout_sec='long'"),
        ({TOML: "[environment]\ngpus = 1"}, "environment.gpus=1"),
        ({TOML: '[environment]\nos = "windows"'}, "environment.os='windows'"),
        ({TOML: '[environment]\nmemory = "much"'}, "environment.memory='much' must be like 2G"),
        ({TOML: '[environment]\nworkdir = "app"'}, "writes to 'app'"),
        ({TOML: '[environment]\nskills_dir = "/s"'}, "environment.skills_dir='/s'.*not to be had"),
        ({TOML: '[environment.healthcheck]\ncommand = "x"'}, "environment.healthcheck="),
        ({TOML: '[[environment.mcp_servers]]\nname = "x"'}, "environment.mcp_servers="),
        ({TOML: '[verifier]\nenvironment_mode = "separate"'}, "verifier.environment_mode='sepa"),
        ({TOML: '[verifier.env]\nKEY = "${KEY}"'}, "verifier.env takes .* from this machine"),
        ({TOML: '[[steps]]\nname = "one"'}, "steps="),
        ({TOML: '[agent]\nuser = "me"'}, r"user = 'me' .*without: \[user\]"),
        ({TOML: '[agent]\nnetwork_mode = "allowlist"'}, r"'allowlist' .*without: \[network\]"),
        ({TOML: '[environment]\ndocker_image = "a/b"'}, r"docker_image = 'a/b' .*\[image\]"),
        ({"instruction.md": None}, "can't be read: .*instruction.md"),
        ({"tests/test.sh": None}, "can't be read: .*test.sh"),
        ({DOCKERFILE: None}, "can't be read: .*Dockerfile"),
        ({"tests/test.sh": "apt-get -qq update"}, r"test.sh: apt-get -qq update .*\[network\]"),
        ({"environment/docker-compose.yaml": ""}, "has a compose file"),
        ({DOCKERFILE: "FROM a\nFROM b"}, "Dockerfile, line 2: FROM begins a second stage"),
        ({DOCKERFILE: "FROM a\nRUN pip install x"}, r"line 2: pip install .*\[image, network\]"),
        ({DOCKERFILE: "FROM a\nUSER me"}, r"line 2: USER me .*\[image, user\]"),
        ({DOCKERFILE: "FROM a\nENTRYPOINT x"}, "line 2: ENTRYPOINT can't be followed"),
        ({DOCKERFILE: "FROM a\nCOPY none ."}, "line 2: COPY names 'none', which is not in"),
        ({DOCKERFILE: "FROM a\nCOPY ../task.toml ."}, "COPY names '../task.toml', which leads out"),
        ({DOCKERFILE: "FROM a\nCOPY log.txt /usr/x"}, "COPY writes to '/usr/x'"),
        ({DOCKERFILE: "FROM a\nCOPY log.txt /"}, "COPY writes to '/'"),
        ({DOCKERFILE: "FROM a\nCOPY log.txt"}, "COPY names no source"),
        ({DOCKERFILE: "FROM a\nCOPY --from=b x y"}, "COPY has --from=b"),
        ({DOCKERFILE: "FROM a\nADD a.tar.gz ."}, "ADD fetches or unpacks a.tar.gz"),
        ({DOCKERFILE: "FROM a\nADD https://x/y ."}, "ADD fetches or unpacks"),
        ({DOCKERFILE: "FROM a\nWORKDIR /etc/x"}, "WORKDIR writes to '/etc/x'"),
        ({DOCKERFILE: "FROM a\nRUN --mount=x y"}, "RUN has --mount=x"),
        ({DOCKERFILE: "FROM a\nRUN cat <<EOF\nx\nEOF"}, "RUN has a heredoc"),
        ({DOCKERFILE: "FROM a\nSHELL bash"}, "SHELL has 'bash', which is no list"),
        ({DOCKERFILE: "FROM a\nRUN x \\\n"}, "line 2: it does not end"),
        ({DOCKERFILE: "# escape=`\nFROM a"}, "line 1: only"),
        (
            {DOCKERFILE: "FROM a\nCOPY . .", "environment/.dockerignore": "x"},
            "beside a .dockerignore",
        ),
    ],
)
def test_a_folder_that_can_not_be_played_is_refused_by_name(changes, why, tmp_path):
    task_folders.harbor(tmp_path / "tasks/wrong", **{DOCKERFILE: "", **changes})
    task_folders.harbor(tmp_path / "tasks/right", **{DOCKERFILE: ""})
    with pytest.raises(ValueError, match=f"1 of 2 tasks can't be played .*wrong: .*{why}"):
        HarborEnv(path=str(tmp_path / "tasks"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"task.yaml": "instruction: [x"}, "is no YAML"),
        ({"task.yaml": "difficulty: easy"}, "task.yaml: instruction="),
        ({"task.yaml": "instruction: x\nparser_name: swebench"}, "parser_name='swebench'"),
        ({"task.yaml": "instruction: x\nrun_tests_in_same_shell: true"}, "same_shell=True"),
        ({"docker-compose.yaml": "services: {client: {}, db: {}}"}, "services .client, db."),
        ({"docker-compose.yaml": "[]"}, "services .none."),
        ({"run-tests.sh": "uvx pytest"}, r"run-tests.sh: uvx .*\[network\]"),
        ({"run-tests.sh": None}, "can't be read: .*run-tests.sh"),
    ],
)
def test_so_is_one_of_terminal_bench(changes, why, tmp_path):
    task_folders.terminal_bench(tmp_path / "wrong", **changes)
    with pytest.raises(ValueError, match=f"wrong: .*{why}"):
        HarborEnv(path=str(tmp_path), without=["image"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"path": ""}, "path='' is no folder"),
        ({"path": "/no/such"}, "path='/no/such' is no folder"),
        ({"tasks": ["z*"]}, r"has no task that tasks=\['z\*'\] name, of 1"),
        ({"tasks": "count"}, r"tasks='count' must be a list: \[count\]"),
        ({"without": ["gpus"]}, r"without=\['gpus'\] can't be left out: only image, network"),
        ({"split": "test"}, "split='test' must be"),
        ({"max_turns": 0}, "max_turns=0 must be more than 0"),
        ({"verifier_s": float("inf")}, "verifier_s=inf must be more than 0"),
        ({"without": ["image"], "split": "heldout"}, "has no heldout tasks among its 1: give more"),
    ],
)
def test_a_wrong_option_is_named(options, why, tmp_path):
    task_folders.harbor(tmp_path / "count")
    with pytest.raises(ValueError, match=why):
        HarborEnv(**{"path": str(tmp_path), **options})


def test_a_mistake_is_told_before_a_run_starts(tmp_path):
    task_folders.harbor(tmp_path / "count")
    config = EnvConfig(name="flash.envs.harbor:HarborEnv", options={"path": str(tmp_path)})
    with pytest.raises(ValueError, match=r"env.options: .*count: FROM debian:12-slim .*\[image\]"):
        try_environment(config)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("set -e\napt-get   install -y curl", "apt-get install"),
        ("python -m pip install pytest==8", "pip install"),
        ("curl -LsSf https://astral.sh/uv/install.sh | sh", "curl -LsSf https://"),
        ("git clone x", "git clone"),
        ("# apt-get install x", None),
        ("curl -s http://localhost:80/", None),
        ("pip list; cat apt-get; pytest", None),
    ],
)
def test_what_reaches_for_a_network_is_seen(script, found):
    assert reaches_out(script) == found
