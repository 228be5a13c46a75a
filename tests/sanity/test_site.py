"""The site has every page and every public module; `make docs` checks links and anchors."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def entries(items):
    """The pages of a part of the navigation."""
    for item in items:
        if isinstance(item, str):
            yield item
        else:
            for part in item.values():
                yield from [part] if isinstance(part, str) else entries(part)


NAVIGATION = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def test_each_page_is_once_in_the_navigation():
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(NAVIGATION) == sorted(pages), "add the new page to nav in mkdocs.yml"


def test_the_reference_has_each_public_module():
    reference = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    public = re.findall(r"^\[(rlhf\.[\w.]+)\]$", (ROOT / "tests/sanity/public_names.txt").read_text(), re.MULTILINE)
    assert set(public) <= set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE))
