"""Weight files are told apart, and read once."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flash.worker.checksum import checksum


def write(path: Path, words: bytes, *, written_at: int) -> None:
    path.write_bytes(words)
    os.utime(path, ns=(written_at, written_at))


def test_other_words_names_and_sizes_have_another_checksum(tmp_path):
    sums = set()
    for number, (name, words) in enumerate([
        ("a", b"12345678"), ("a", b"12345679"), ("b", b"12345678"), ("a", b"12345678" * 2),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(words)
        sums.add(checksum(folder))
    assert len(sums) == 4


def test_files_are_read_anew_when_they_have_been_written_to_and_not_before(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, b"12345678", written_at=1)
    first = checksum(tmp_path)
    write(file, b"87654321", written_at=1)  # as nothing that writes does
    assert checksum(tmp_path) == first
    write(file, b"87654321", written_at=2)
    assert checksum(tmp_path) != first


def test_many_threads_are_told_the_same(tmp_path):
    write(tmp_path / "model.safetensors", b"12345678" * 10_000, written_at=1)
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(checksum, [tmp_path] * 64))) == 1
