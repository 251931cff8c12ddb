"""What the pages name is there: files, links, fields, make targets, objectives, decisions."""

import re
from pathlib import Path, PurePosixPath
from typing import get_args

import pytest

from flash.config import Config, fields
from flash.trainer.advantage_settings import AnyAdvantages
from flash.trainer.objectives.settings import SETTINGS, Aggregation

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for start in ("*.md", "docs/**/*.md", "examples/**/*.md") for page in ROOT.glob(start)
)
MAPPED = ("flash", "envs", "agents", "examples", "benchmarks")
DECISIONS = ROOT / "docs/decisions"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def files_of_the_map() -> list[str]:
    """The paths in the map's first column; a bare name lies beside the one before it."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text[text.index("## Where things are") :], re.MULTILINE)
    paths = []
    for row in rows:
        folder = PurePosixPath()
        for name in re.findall(r"`(.+?)`", row):
            top = name.split("/")[0] in MAPPED
            path = name if top else f"{folder}/{name}"
            if top:
                folder = PurePosixPath(path).parent
            paths.append(path)
    return paths


def test_the_map_names_every_file_of_code_and_none_that_is_not_there():
    named = files_of_the_map()
    assert [path for path in named if not (ROOT / path).exists()] == []
    folders = tuple(path for path in named if path.endswith("/"))
    code = [str(f.relative_to(ROOT)) for top in MAPPED for f in (ROOT / top).rglob("*.py")]
    left_out = [
        path
        for path in code
        if path not in named and not path.startswith(folders) and "__init__" not in path
    ]
    assert left_out == []


@each_page
def test_links_and_paths_lead_to_files(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(rf"`((?:{'|'.join(MAPPED)}|tests|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"python\s(benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script


@each_page
def test_anchors_are_headings(page):
    for file, anchor in re.findall(r"\]\(([\w/.]*)#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.+)$", (page.parent / file).read_text(), re.MULTILINE)
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


@each_page
def test_fields_are_those_of_the_configuration(page):
    if page.name in ("CHANGELOG.md", "coming-from.md"):
        return  # they name those that have moved, and other systems' (tests/convert/test_page.py)
    known = {name for name, _ in fields(Config)}
    sections = {name.split(".")[0] for name in known if "." in name}
    for name in re.findall(
        rf"`(?:--)?((?:{'|'.join(sections)})\.[a-z_.]+)[`= :]", page.read_text()
    ):
        assert name in known or name.endswith(".py"), name


@each_page
def test_make_targets_are_the_makefiles(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE):
        assert target in targets, target


def test_every_decision_is_in_the_index_and_says_why_what_and_what_follows():
    index = (DECISIONS / "README.md").read_text()
    told = re.findall(r"^\| \[(\d+)\]\((\S+\.md)\) \| (.+) \|$", index, re.MULTILINE)
    assert [file for _, file, _ in told] == sorted(f.name for f in DECISIONS.glob("0*.md"))
    for number, file, title in told:
        text = (DECISIONS / file).read_text()
        assert text.startswith(f"# {number}: {title}\n")
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences"], file


def test_every_example_is_in_their_index():
    index = (ROOT / "examples/README.md").read_text()
    for path in (ROOT / "examples").glob("[!_R]*"):
        assert f"| `{path.name}{'/' if path.is_dir() else ''}` |" in index


def test_every_objective_aggregation_and_kind_of_advantages_is_explained_with_its_defaults():
    objectives, advantages = (ROOT / "docs/objectives.md").read_text().split("\n## Advantages\n")
    for name, settings in SETTINGS.items():
        if name != "supervised":
            assert_row(objectives, name, settings)
    for name in get_args(Aggregation):
        assert f"\n| `{name}` |" in objectives
    for settings in get_args(get_args(AnyAdvantages)[0]):
        name = settings.model_fields["name"].default
        assert_row(advantages, name, settings, leave_out=("whiten", "clip"))


def assert_row(text, name, settings, leave_out=()) -> None:
    """The last row of that name holds each setting and its default."""
    rows = [line for line in text.splitlines() if f"`{name}`" in "".join(line.split("|")[1:2])]
    assert len(rows) >= 2, name
    told = dict(re.findall(r"`(\w+)` ([\w.-]+)", rows[-1].split("|")[-3]))
    for field, info in settings.model_fields.items():
        if field not in ("name", *leave_out):
            number = isinstance(info.default, float)
            as_told = float(told[field]) if number else told[field].lower()
            assert as_told == (info.default if number else str(info.default).lower()), field
