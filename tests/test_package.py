"""What a wheel of this package holds."""

import re
import zipfile
from pathlib import Path

import pytest

from tests.wheels import build_wheel

ROOT = Path(__file__).parents[1]
INSTALLED_AS = {"flash": "flash", "envs": "flash/envs", "agents": "flash/agents"}
KINDS = ("*.py", "*.pyi", "*.yaml", "py.typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    names = (*INSTALLED_AS, "setup.cfg", "pyproject.toml", "docs", "LICENSE")
    return build_wheel(ROOT, names, tmp_path_factory.mktemp("source"))


def test_a_wheel_holds_every_file_of_the_three_folders_under_its_imported_name(wheel):
    sources = {
        f"{installed}/{path.relative_to(ROOT / folder)}"
        for folder, installed in INSTALLED_AS.items()
        for kind in KINDS
        for path in (ROOT / folder).rglob(kind)
    }
    assert "flash/py.typed" in sources, "type checkers overlook a package without it"
    assert sources == {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_page_of_the_package_has_no_link_that_leads_nowhere_outside_the_repository(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    page = wheel.read(metadata).decode()
    assert "\n# flash\n" in page
    assert re.findall(r"\]\((?!https?://)[^)]*\)", page) == []


def test_a_wheel_carries_its_licence(wheel):
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    assert "\nLicense: Apache-2.0" in wheel.read(metadata).decode()
