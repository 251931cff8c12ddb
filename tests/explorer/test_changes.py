"""What makes weights of the ones before: exactly them, in few bytes, or nothing."""

from pathlib import Path

import numpy as np
import pytest

from flash.explorer import changes
from flash.explorer.changes import apply_changes, write_changes

FILE = "model-00001.safetensors"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(changes, "_CHUNK_WORDS", 1000)


def folder(path: Path, words: np.ndarray, *, last: bytes = b"", config: str = "{}") -> Path:
    path.mkdir()
    (path / FILE).write_bytes(words.astype(np.uint16).tobytes() + last)
    (path / "config.json").write_text(config)
    return path


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    "places",
    [[], [0], [2999], [0, 2999], [254], [255], [256, 511], [999, 1000], [10, 11, 12, 2000]],
)  # fmt: skip
@pytest.mark.parametrize("by", [1, -1, 127, -127, 128, -128, 129, 30_000])
def test_the_words_that_changed_and_no_others(tmp_path, places, by):
    old = np.random.default_rng(0).integers(0, 1 << 16, 3000).astype(np.uint16)
    new = old.copy()
    new[places] += np.int16(by).astype(np.uint16)
    before = folder(tmp_path / "before", old)
    after = folder(tmp_path / "after", new, config='{"changed": 1}')
    assert write_changes(before, after, tmp_path / "changes")
    apply_changes(before, tmp_path / "changes", tmp_path / "made")
    assert content(tmp_path / "made") == content(after)


@pytest.mark.parametrize(
    ("words", "last"), [(2000, b""), (2001, b"x"), (1, b"y"), (0, b"z"), (0, b"")]
)
def test_files_of_any_size(tmp_path, words, last):
    rng = np.random.default_rng(1)
    old = rng.integers(0, 1 << 16, words).astype(np.uint16)
    new = np.where(rng.random(words) < 0.1, old + 1, old)
    before = folder(tmp_path / "before", old, last=last and b"a", config="{}" * 200)
    after = folder(tmp_path / "after", new, last=last, config="")
    (after / "config.json").write_text("")
    if write_changes(before, after, tmp_path / "changes"):
        apply_changes(before, tmp_path / "changes", tmp_path / "made")
        assert content(tmp_path / "made") == content(after)
    else:
        assert words < 2  # the sizes alone are more


def test_a_step_of_bfloat16_weights_is_two_bytes_a_change(tmp_path):
    rng = np.random.default_rng(2)
    weights = rng.normal(0, 0.02, 100_000).astype(np.float32)
    stepped = weights + 1e-6 * np.sign(rng.normal(size=len(weights)))
    before = folder(tmp_path / "before", bfloat16(weights))
    after = folder(tmp_path / "after", bfloat16(stepped))
    changed = int((bfloat16(weights) != bfloat16(stepped)).sum())
    assert 500 < changed < 10_000
    assert write_changes(before, after, tmp_path / "changes")
    assert 2 * changed < size(tmp_path / "changes") < 2.2 * changed + 2000
    apply_changes(before, tmp_path / "changes", tmp_path / "made")
    assert content(tmp_path / "made") == content(after)


def test_nothing_is_written_where_that_saves_little(tmp_path):
    rng = np.random.default_rng(3)
    before = folder(tmp_path / "before", rng.integers(0, 1 << 16, 5000))
    after = folder(tmp_path / "after", rng.integers(0, 1 << 16, 5000))
    assert not write_changes(before, after, tmp_path / "changes")
    assert not (tmp_path / "changes").exists()
    other = folder(tmp_path / "other", rng.integers(0, 1 << 16, 4999))
    assert not write_changes(other, after, tmp_path / "changes")


def test_what_was_compared_first_stands_for_the_rest(tmp_path, monkeypatch):
    old = np.random.default_rng(4).integers(0, 1 << 16, 50_000).astype(np.uint16)
    new = old.copy()
    new[:3000] += 1000
    before, after = folder(tmp_path / "before", old), folder(tmp_path / "after", new)
    assert write_changes(before, after, tmp_path / "changes")
    monkeypatch.setattr(changes, "_FIRST_BYTES", 4000)
    assert not write_changes(before, after, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_changes_of_another_file_or_cut_ones_are_refused(tmp_path):
    old = np.arange(3000)
    before = folder(tmp_path / "before", old)
    after = folder(tmp_path / "after", np.where(old % 50, old, old + 1))
    assert write_changes(before, after, tmp_path / "changes")
    shorter = folder(tmp_path / "shorter", old[:2500])
    with pytest.raises(ValueError, match="of another file"):
        apply_changes(shorter, tmp_path / "changes", tmp_path / "made")
    fewer = folder(tmp_path / "fewer", old[:1000])
    with pytest.raises(ValueError, match="bytes are left"):
        apply_changes(fewer, tmp_path / "changes", tmp_path / "made")
    file = tmp_path / "changes" / f"{FILE}.changes"
    whole = file.read_bytes()
    for kept in (0, 5, 20, len(whole) - 1):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="changes"):
            apply_changes(before, tmp_path / "changes", tmp_path / "made")
