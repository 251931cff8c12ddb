import contextlib
import http
import json
import socket
import threading

import pytest

pytest.importorskip("websockets", reason="needs the extra 'openenv'")

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

from flash.environments import boundary
from flash.envs.openenv import OpenEnv
from flash.errors import EnvFailure
from flash.types import Task
from tests import openenv

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    with openenv.server() as url:
        yield url


@pytest.fixture
def echo(server):
    """The environment that `openenv init` makes."""
    return f"{server}/echo"


@pytest.fixture
def numbers(server):
    return f"{server}/numbers"


@pytest.fixture
def opened():
    envs = []

    def make(url, **options):
        envs.append(OpenEnv(url=url, **options))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def won(env):
    """Guesses until it is right: the number, and the last answer."""
    for number in range(10):
        answer = env.step(str(number))
        if answer[2]:
            return number, answer
    raise AssertionError("no number was right")


def test_an_environment_of_openenv_s_own_template_is_played_with_its_url_alone(echo, opened):
    env = opened(echo)
    text, _ = env.reset(seed=1)
    assert json.loads(text)["message_length"] == 0
    assert env.step("hello") == (
        '{"echoed_message": "hello", "message_length": 5}', 0.5, False, False, {"metadata": {}}
    )  # fmt: skip


def test_a_session_more_than_the_server_has_is_an_environment_s_failure_with_the_remedy(
    echo, opened
):
    first, second = opened(echo), opened(echo)
    first.reset(seed=1)
    with pytest.raises(EnvFailure, match=f"{echo} has no session left: .*max_concurrent_envs"):
        boundary.reset(second, Task(2))
    first.close()
    # The server lets go of a session in its own time.
    for _ in range(100):
        try:
            assert second.reset(seed=2)[0]
            return
        except RuntimeError:
            continue
    raise AssertionError("the session was not given back")


def test_an_episode_ends_with_a_reward_and_success(numbers, opened):
    env = opened(numbers, observation="text")
    assert env.reset(seed=3)[0] == "task 6: guess a number up to 9"
    number, (text, reward, terminated, truncated, info) = won(env)
    assert (text, reward, terminated, truncated) == (f"{number + 1}: right", 1.0, True, False)
    assert info["success"]
    assert info["observation"] == {"most": 9}


def test_a_task_s_options_go_to_the_server(numbers, opened):
    seen = boundary.reset(opened(numbers, observation="text"), Task(1, {"most": 4}))
    assert seen.text == "task 2: guess a number up to 4"


def test_the_splits_have_other_seeds(numbers, opened):
    env = opened(numbers, observation="text", split="heldout")
    assert env.reset(seed=3)[0] == "task 7: guess a number up to 9"


def test_episodes_at_once_do_not_share_a_session(numbers, opened):
    one, other = (opened(numbers, observation="text") for _ in range(2))
    one.reset(seed=1)
    one.step("0")
    other.reset(seed=1)
    assert other.step("1")[0].startswith("1: ")
    assert one.step("2")[0].startswith("2: ")


def test_an_action_that_has_not_the_form_is_told_to_the_policy_and_the_episode_goes_on(
    numbers, opened
):
    env = opened(numbers, observation="text")
    env.reset(seed=1)
    text, reward, terminated, _, info = env.step("seven")
    assert "number: Input should be a valid integer" in text
    assert (reward, terminated, info) == (0.0, False, {"refused": True})
    assert env.step("7")[0].startswith("1: ")


def test_the_text_may_be_the_action_s_json(numbers, opened):
    env = opened(numbers, action="json", observation="text")
    env.reset(seed=1)
    assert env.step('{"number": 3}')[0].startswith("1: ")
    for text in ("3", "{", "[" * 100_000):
        assert "it is no JSON" in env.step(text)[0]


def test_a_template_says_where_the_text_goes(numbers, opened):
    env = opened(numbers, action={"number": "{text}", "metadata": {"of": ["{text}"]}})
    env.reset(seed=1)
    assert json.loads(env.step("3")[0])["text"].startswith("1: ")


def test_what_the_environment_raises_fails_the_episode_and_the_next_one_is_played(numbers, opened):
    env = opened(numbers, observation="text")
    boundary.reset(env, Task(1))
    with pytest.raises(EnvFailure, match=f"{numbers} answered step with EXECUTION_ERROR: below 0"):
        boundary.step(env, "-1")
    with pytest.raises(EnvFailure, match="reset first"):
        boundary.step(env, "1")
    assert boundary.reset(env, Task(1)).text
    assert boundary.step(env, "1").text.startswith("1: ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"action": {"nummer": "{text}"}}, "action has nummer: the server's have metadata, number"),
        ({"action": {"metadata": {"of": "{text}"}}}, "lacks number, which the server needs"),
        ({"action": {"number": 3}}, "must have '{text}' in a field, or be json"),
        ({"action": "text"}, "action='text' must have '{text}' in a field, or be json"),
        ({"observation": "txt"}, "observation='txt' must be one of most, text"),
        ({"timeout_s": 0}, "timeout_s=0 must be more than 0"),
        ({"url": "127.0.0.1:8000"}, "url='127.0.0.1:8000' must begin with http"),
        ({"split": "test"}, "split='test' must be"),
    ],
)
def test_a_wrong_option_is_named_before_anything_starts(numbers, options, said):
    with pytest.raises(ValueError, match=said):
        OpenEnv(**({"url": numbers} | options))


def test_a_server_that_is_not_there_or_does_not_answer_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"url='{url}' can't be asked .* timed out: start"):
            OpenEnv(url=url, timeout_s=0.05)
    with pytest.raises(ValueError, match=f"url='{url}' can't be asked .*refused.*: start"):
        OpenEnv(url=url)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "ended the session"),
        ("", "did not answer reset within 1 s"),
        ("<html>", "answered reset as no OpenEnv server does"),
        ('{"type": "observation", "data": {}}', "as no OpenEnv server does: .*`observation`"),
        ('{"type": "error", "data": {"code": "ODD", "message": "so"}}', "reset with ODD: so"),
    ],
)
def test_a_server_that_fails_in_a_session_is_named_and_asked_anew_in_another(answer, said):
    sessions = []

    def play(session):
        sessions.append(session)
        session.recv()
        if answer:
            session.send(answer)
        elif answer is not None:
            with contextlib.suppress(ConnectionClosed):
                session.recv()  # until it is left

    def schema(session, request):
        if request.path == "/schema":
            return session.respond(http.HTTPStatus.OK, '{"action": {}, "observation": {}}')
        return None

    with serve(play, "127.0.0.1", 0, process_request=schema) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{served.socket.getsockname()[1]}"
        env = OpenEnv(url=url, action="json", timeout_s=1)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"{url} .*{said}"):
                env.reset(seed=1)
        served.shutdown()
        thread.join()
    assert len(sessions) == 2
