"""Dockerfiles, as far as they can be followed where there are no images.

What builds images takes the file whole; this is for sandboxes that don't. Of the packages that read
Dockerfiles none follows them, and dockerfile-parse, the common one, knows no heredocs.
"""

import json
import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

Need = Literal["image", "network", "user"]

_DEFAULT_FOLDER = "/app"  # where the image may say another, which is not there
_OF_THE_SYSTEM = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "proc", "sys"}
_OF_THE_SYSTEM |= {"dev", "run", "boot"}
_WITHOUT_EFFECT = {"CMD", "EXPOSE", "LABEL", "MAINTAINER", "STOPSIGNAL"}  # the agent has a shell
_VARIABLE = re.compile(r"\\(\$)|\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
_HEREDOC = re.compile(r"<<-?\s*[\"']?[A-Za-z_]")
_REACHES_OUT = re.compile(
    r"""\b(?:
        (?:apt-get|apt|apk|dnf|yum|microdnf|zypper)\s+(?:-\S+\s+)*(?:update|upgrade|install|add)
        | pip[\d.]*\s+(?:-\S+\s+)*(?:install|download)
        | uv\s+(?:pip\s+install|add|sync) | uvx | (?:conda|gem|go|cargo)\s+install | go\s+get
        | (?:npm|yarn|pnpm)\s+(?:install|ci|add) | git\s+clone
        | (?:curl|wget)\b[^\n|;&]*https?://(?!localhost|127\.)
    )\b""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Copy:
    """Files of the context, and where they go.

    name: of the one file there; None: each source keeps its own, and folders give what they hold.
    """

    sources: tuple[Path, ...]
    folder: str
    name: str | None


@dataclass(frozen=True, slots=True)
class Run:
    """A command of the build; `where` tells its line."""

    where: str
    argv: tuple[str, ...]
    folder: str
    env: dict[str, str]


@dataclass(slots=True)
class Recipe:
    """What a Dockerfile asks for.

    needs: what of it a sandbox must have to offer, and which words ask for it.
    """

    steps: list[Copy | Run] = field(default_factory=list)
    folder: str = _DEFAULT_FOLDER
    env: dict[str, str] = field(default_factory=dict)
    needs: dict[Need, str] = field(default_factory=dict)


def read_dockerfile(path: Path, context: Path) -> Recipe:
    """ValueError names the line that can't be followed."""
    reader = _Reader(context.resolve())
    for number, name, rest in _instructions(path):
        try:
            reader.take(f"{path.name}, line {number}", name, rest)
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {name} {error}") from error
    return reader.recipe


def reaches_out(script: str) -> str | None:
    """What in a shell's script asks for a network, by what such commands are called."""
    code = "\n".join(line for line in script.splitlines() if not line.lstrip().startswith("#"))
    found = _REACHES_OUT.search(code)
    return " ".join(found[0].split()) if found else None


def root_folder(path: str) -> str:
    """The folder of the root that holds it; ValueError if that is the system's."""
    first, *rest = PurePosixPath(posixpath.normpath(path)).parts
    if first != "/" or not rest or rest[0] in _OF_THE_SYSTEM:
        raise ValueError(f"writes to {path!r}: without an image the system is this machine's")
    return f"/{rest[0]}"


def _instructions(path: Path) -> Iterator[tuple[int, str, str]]:
    """Their first lines' numbers, their names and the rest, without the ends of lines."""
    begun, whole = 0, ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if re.match(r"\s*#\s*escape\s*=\s*`", line):
            raise ValueError(f"{path.name}, line {number}: only \\ is read as escape")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun = begun if whole else number
        if line.rstrip().endswith("\\"):
            whole += line.rstrip()[:-1]
            continue
        name, _, rest = (whole + line).strip().partition(" ")
        whole = ""
        yield begun, name.upper(), rest.strip()
    if whole:
        raise ValueError(f"{path.name}, line {begun}: it does not end")


class _Reader:
    def __init__(self, context: Path) -> None:
        self.recipe = Recipe()
        self._context = context
        self._build_env: dict[str, str] = {}
        self._shell = ["/bin/sh", "-c"]
        self._folders = {_DEFAULT_FOLDER}  # that are there by now

    def take(self, where: str, name: str, rest: str) -> None:
        recipe = self.recipe
        if name in ("RUN", "COPY", "ADD") and _HEREDOC.search(rest):
            raise ValueError("has a heredoc, which is not read here: write a file and COPY it")
        match name:
            case "FROM":
                self._from(rest)
            case "WORKDIR":
                recipe.folder = self._path(self._expanded(rest))
                self._make_folder(where, recipe.folder)
            case "ENV":
                self._env(rest)
            case "ARG":
                key, _, value = rest.partition("=")
                self._build_env[key] = self._expanded(" ".join(shlex.split(value)))
            case "COPY" | "ADD":
                self._copy(where, rest, may_fetch=name == "ADD")
            case "RUN":
                self._run(where, rest)
            case "SHELL":
                self._shell = _texts(rest)
            case "USER":
                if rest not in ("root", "0"):
                    recipe.needs.setdefault("user", f"{where}: USER {rest}")
            case _ if name not in _WITHOUT_EFFECT:
                raise ValueError("can't be followed without an image")

    def _from(self, rest: str) -> None:
        if "image" in self.recipe.needs:
            raise ValueError("begins a second stage, which can't be followed without an image")
        self.recipe.needs["image"] = f"FROM {rest}"

    def _env(self, rest: str) -> None:
        key, _, value = rest.partition(" ")
        if "=" in key:
            pairs = [word.partition("=")[::2] for word in shlex.split(rest)]
        else:
            pairs = [(key, value.strip())]
        for key, value in pairs:
            if key != "PATH":  # is where the image's commands are
                self.recipe.env[key] = self._build_env[key] = self._expanded(value)

    def _copy(self, where: str, rest: str, *, may_fetch: bool) -> None:
        flags, rest = _flags(rest)
        if refused := [flag for flag in flags if not flag.startswith("--chown=")]:
            raise ValueError(f"has {refused[0]}, which can't be followed without an image")
        words = _texts(rest) if rest.startswith("[") else shlex.split(rest)
        *given, target = map(self._expanded, words)
        if not given:
            raise ValueError("names no source, or no place for it")
        sources = [source for name in given for source in self._sources(name, may_fetch)]
        place = self._path(target)
        into = len(sources) > 1 or target.endswith(("/", ".")) or place in self._folders
        if into or sources[0].is_dir():
            self.recipe.steps.append(Copy(tuple(sources), place, None))
            self._folders.add(place)
        else:
            at = PurePosixPath(place)
            root_folder(str(at.parent))
            self.recipe.steps.append(Copy(tuple(sources), str(at.parent), at.name))

    def _sources(self, name: str, may_fetch: bool) -> list[Path]:
        if may_fetch and (":" in name or ".tar" in name or name.endswith(".tgz")):
            raise ValueError(f"fetches or unpacks {name}: COPY it")
        relative = name.lstrip("/") or "."
        found = [self._context] if relative in (".", "./") else []
        found = found or sorted(self._context.glob(relative))
        if not found:
            raise ValueError(f"names {name!r}, which is not in {self._context.name}/")
        for source in found:
            if not source.resolve().is_relative_to(self._context):
                raise ValueError(f"names {name!r}, which leads out of {self._context.name}/")
        if (self._context / ".dockerignore").exists() and any(map(Path.is_dir, found)):
            raise ValueError("copies a folder beside a .dockerignore, which is not read here")
        return found

    def _run(self, where: str, rest: str) -> None:
        flags, command = _flags(rest)
        if flags:
            raise ValueError(f"has {flags[0]}, which can't be followed without an image")
        if out := reaches_out(command):
            self.recipe.needs.setdefault("network", f"{where}: {out}")
        argv = _texts(command) if command.startswith("[") else [*self._shell, command]
        env = dict(self._build_env)
        self.recipe.steps.append(Run(where, tuple(argv), self.recipe.folder, env))

    def _make_folder(self, where: str, path: str) -> None:
        self._folders.add(path)
        self.recipe.steps.append(Run(where, ("/bin/mkdir", "-p", path), "/", {}))

    def _path(self, text: str) -> str:
        path = posixpath.normpath(posixpath.join(self.recipe.folder, text))
        root_folder(path)
        return path

    def _expanded(self, text: str) -> str:
        def value(found: re.Match[str]) -> str:
            escaped, braced, default, bare = found.groups()
            return escaped or self._build_env.get(braced or bare) or default or ""

        return _VARIABLE.sub(value, text)


def _flags(rest: str) -> tuple[list[str], str]:
    flags = []
    while rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        flags.append(flag)
        rest = rest.lstrip()
    return flags, rest


def _texts(rest: str) -> list[str]:
    try:
        texts = json.loads(rest)
    except json.JSONDecodeError as error:
        raise ValueError(f"has {rest!r}, which is no list of texts") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"has {rest!r}, which is no list of texts")
    return texts
