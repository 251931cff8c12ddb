"""A worker's command line: its key."""

from pathlib import Path

from flash.worker.config import parse


def test_no_worker_is_without_a_key(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    arguments = [f"--model={tmp_path}"]
    monkeypatch.setenv("FLASH_WORKER_API_KEY", "given")
    assert parse(arguments, "worker").api_key == "given"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FLASH_WORKER_API_KEY", "")
    made = [parse(arguments, "worker").api_key for _ in range(2)]
    monkeypatch.delenv("FLASH_WORKER_API_KEY")
    made.append(parse(arguments, "worker").api_key)
    assert len(set(made)) == 3
    assert min(map(len, made)) > 20
    told = capsys.readouterr().err
    assert all(f"the key is {key}" in told for key in made)
