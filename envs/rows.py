"""Rows of data sets, as the library `datasets` reads them: of files, a folder, or the hub."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

# The library guesses types of JSON: texts become times, and types that are mixed may be refused.
# So lines are read as texts, and each is parsed by itself.
_BUILDERS = {
    ".jsonl": "text", ".ndjson": "text", ".json": "json", ".parquet": "parquet", ".csv": "csv",
    ".tsv": "csv", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LINE = "a line of JSON"  # what the column of such lines is called
_MOST_SHOWN = 300

State = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSource:
    """Where rows come from.

    paths: files and patterns of them, all of one kind; or one folder, or one name on the hub.
    subset: which of a data set's configurations.
    split: of the data set's own, or a part of one: `train[:1000]`.
    revision: of the hub's, a commit, branch or tag.
    """

    paths: tuple[str, ...]
    subset: str = ""
    split: str = "train"
    revision: str = ""

    @classmethod
    def of(
        cls,
        path: str | Sequence[str],
        *,
        subset: str = "",
        split: str = "train",
        revision: str = "",
    ) -> "RowSource":
        """ValueError, which names the option, for what can't be one."""
        paths = (
            (path,) if isinstance(path, str) else tuple(path) if isinstance(path, Sequence) else ()
        )
        if not paths or not all(isinstance(each, str) and each for each in paths):
            raise ValueError(
                f"path={path!r} must name files (jsonl, json, csv, parquet, arrow), a folder of "
                f"them, or a data set on the hub, as openai/gsm8k"
            )
        for option, value in (("subset", subset), ("data_split", split), ("revision", revision)):
            if not isinstance(value, str):
                raise ValueError(f"{option}={value!r} must be a text")
        return cls(paths=paths, subset=subset, split=split, revision=revision)

    def __str__(self) -> str:
        return f"path={self.paths[0]!r}" if len(self.paths) == 1 else f"path={[*self.paths]!r}"

    def files(self) -> list[str]:
        """Those on this machine; none of a name on the hub. ValueError for a path to nowhere."""
        if self.is_on_hub():
            return []
        found: list[str] = []
        for path in self.paths:
            place = os.path.expanduser(path)
            here = [place] if os.path.exists(place) else sorted(glob.glob(place, recursive=True))
            if not here:
                raise ValueError(f"path={path!r} can't be read: No such file or directory")
            found += here
        return found

    def state(self) -> State:
        """Which is another once a file has changed."""
        files = self.files()
        if len(files) == 1 and os.path.isdir(files[0]):
            files = sorted(str(each) for each in Path(files[0]).rglob("*") if each.is_file())
        stats = ((file, os.stat(file)) for file in files)
        return tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in stats)

    def is_on_hub(self) -> bool:
        """Or would be: the path is none of this machine, and may be a name there."""
        (path, *more) = self.paths
        looks_so = not more and _HUB_NAME.fullmatch(path) and _suffix(path) not in _BUILDERS
        return bool(looks_so) and not os.path.exists(path)


def open_rows(source: RowSource) -> "Dataset":
    """The rows, mapped from a file in the library's cache, where the first process writes them;
    what they hold is told by `entries`.

    Raises ValueError with the path and the remedy: there is no such data set, configuration,
    split or revision, it has no rows, or can't be read.
    """
    try:
        import datasets  # noqa: PLC0415  (an extra, which takes a second)
    except ImportError as error:
        raise ValueError(
            f"{source} needs datasets, which is not installed ({error}): "
            f"pip install 'flash-rl[datasets]'"
        ) from error
    # Else each reading is told to its makers, which takes seconds where there is no network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    arguments = _arguments(source)
    if arguments["path"] == "text":
        arguments["features"] = datasets.Features({_LINE: datasets.Value("string")})
    try:
        with without_bars():
            return datasets.load_dataset(**arguments, split=source.split)
    except StopIteration as error:  # of a file without a line
        raise ValueError(f"{source} has no rows: give another file") from error
    except Exception as error:  # whatever a reader raises at a user's data
        raise ValueError(f"{source} can't be read: {_cause(error)}: {_remedy(source)}") from error


def are_lines(rows: "Dataset") -> bool:
    """Whether they have no columns, but are lines that may have any fields."""
    return list(rows.column_names) == [_LINE]


def entries(
    columns: Mapping[str, Sequence[Any]], numbers: Sequence[int]
) -> Iterator[tuple[str, Any]]:
    """What is in a batch of rows that have these numbers, each with its place: `line 3`.

    Blank lines are left out. Raises ValueError, with the place, for a line that is not JSON.
    """
    lines = columns.get(_LINE)
    if lines is None:
        for at, number in enumerate(numbers):
            yield f"row {number + 1}", {name: column[at] for name, column in columns.items()}
        return
    for number, line in zip(numbers, lines, strict=True):
        if line.strip():
            yield f"line {number + 1}", _parsed(line, number)


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:  # too many digits, or within each other
        why = str(error)
    raise ValueError(f"line {number + 1} is not JSON: {why}")


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """The library shows no progress inside."""
    import datasets  # noqa: PLC0415

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _arguments(source: RowSource) -> dict[str, Any]:
    """Of load_dataset."""
    files = source.files()
    if not files:
        return {
            "path": source.paths[0],
            "name": source.subset or None,
            "revision": source.revision or None,
        }
    for option, value in (("subset", source.subset), ("revision", source.revision)):
        if value and (option == "revision" or not os.path.isdir(files[0])):
            raise ValueError(
                f"{option}={value!r} is of a data set on the hub, and {source} is on this machine: "
                f"leave it out"
            )
    if os.path.isdir(files[0]) and len(files) == 1:
        return {"path": files[0], "name": source.subset or None}
    kinds = {_suffix(file) for file in files}
    builders = {_BUILDERS.get(kind) for kind in kinds}
    if len(kinds) > 1 or None in builders:
        found = ", ".join(sorted(kind or "no suffix" for kind in kinds))
        raise ValueError(
            f"{source} has files of {found}: give files of one kind of {', '.join(_BUILDERS)}, "
            f"compressed or not"
        )
    builder = builders.pop()
    how = {"sep": "\t"} if kinds == {".tsv"} else {}
    if builder == "text":
        how = {"encoding": "utf-8-sig"}  # with a byte order mark or without
    return {"path": builder, "data_files": files} | how


def _suffix(path: str) -> str:
    """Of what is in it, if it is compressed."""
    place = Path(path)
    return (place.with_suffix("") if place.suffix in _COMPRESSED else place).suffix.lower()


def _cause(error: BaseException) -> str:
    """In a line: what is beneath the library's own errors, which say only where they were."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _remedy(source: RowSource) -> str:
    if source.is_on_hub():
        return (
            "correct the name, subset, data_split or revision; without a connection it must be in "
            "the hub's cache, and a gated one wants HF_TOKEN"
        )
    return "correct the file, in UTF-8, or subset or data_split"
