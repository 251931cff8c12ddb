"""A database that lets nobody in: each reason in a line, with the remedy and without the password.

What takes no server is in tests/wrong_inputs.yaml.
"""

import sys

import psycopg
import pytest

from flash.cli import main as cli


def refused(capsys, url: str) -> str:
    assert cli.run(["train", "frozen_lake", "--log.url", url]) == 2
    return capsys.readouterr().err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir()), "nothing is begun"


@pytest.fixture
def with_password(database_server):
    """The URL of a database whose users give one; {user} and {password} are to be put in."""
    url = database_server.new_database()
    with psycopg.connect(database_server.url, autocommit=True) as connection:
        (path,) = connection.execute("SHOW hba_file").fetchone()
        connection.execute("DROP ROLE IF EXISTS stranger")
        connection.execute("CREATE ROLE stranger LOGIN PASSWORD 'right'")
        with open(path, encoding="utf-8") as file:
            before = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"local all stranger scram-sha-256\n{before}")
        connection.execute("SELECT pg_reload_conf()")
    url = url.replace("postgres:@", "{user}:{password}@", 1)
    asks = False
    while not asks:  # new connections may be made by the old file for a moment yet
        try:
            psycopg.connect(url.format(user="stranger", password="wrong")).close()
        except psycopg.OperationalError:
            asks = True
    return url


@pytest.mark.slow
def test_a_wrong_password_is_not_shown(with_password, here, capsys):
    url = with_password.format(user="stranger", password="secret")
    said = refused(capsys, url)
    assert said.startswith("flash: log.url='postgresql://…@/")
    assert "password authentication failed for user" in said
    assert said.endswith(
        ": give the right one, in PGPASSWORD, in ~/.pgpass, or in a variable that holds the whole "
        "URL, $NAME\n"
    )
    assert "secret" not in said


@pytest.mark.slow
def test_a_user_or_a_database_that_is_not_there_is_named(database_server, here, capsys):
    url = database_server.new_database()
    said = refused(capsys, url.replace("postgres:@", "nobody:secret@", 1))
    assert 'role "nobody" does not exist: make it (createuser), or name another user\n' in said
    name = url.partition("@/")[2].partition("?")[0]
    said = refused(capsys, url.replace(f"/{name}?", "/other?"))
    assert 'database "other" does not exist: make it (createdb), or name another\n' in said


def test_without_psycopg_the_remedy_is_told(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert refused(capsys, "postgresql://me:secret@127.0.0.1:1/db") == (
        "flash: log.url='postgresql://…@127.0.0.1:1/db' needs psycopg, which can't be imported: "
        "pip install 'flash-rl[postgres]'\n"
    )


def test_a_variable_that_holds_a_wrong_url_is_told_as_one(here, monkeypatch, capsys):
    monkeypatch.setenv("LOG_URL", "mysql://me:secret@host/db")
    assert refused(capsys, "$LOG_URL").startswith(
        "flash: log.url='mysql://…@host/db': must be a URL of PostgreSQL"
    )
