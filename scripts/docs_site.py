"""Hooks of mkdocs: what the site needs beyond the pages in docs/.

Pages link to files outside docs/, such as ``../rlhf/data/batch.py``. Each of these files becomes a page of the site,
so that the site is complete without a repository host. Formulas become MathML, which browsers show without a script.
``llms.txt`` lists the pages for programs, each as Markdown.
"""

import html
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure import StructureItem
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "sh", ".json": "json"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    # Anchors as GitHub makes them, so that a link works in both places.
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to, or that such a page links to."""
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        for source in outside_links(page.src_uri, page.content_string):
            if files.get_file_from_path(page_of(source)):
                continue
            added = File.generated(config, page_of(source), content=page_text(source))
            files.append(added)
            waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ lead to the pages of those files."""

    def target(match: re.Match[str]) -> str:
        source = outside_path(page.file.src_uri, match[2])
        if source is None:
            return match[0]
        relative = posixpath.relpath(page_of(source), posixpath.dirname(page.file.src_uri) or ".")
        return match[1] + relative + match[3]

    parts = re.split(rf"({CODE_BLOCK.pattern})", markdown, flags=CODE_BLOCK.flags)
    return "".join(part if part.startswith("```") else LINK.sub(target, part) for part in parts)


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas of a page, marked by arithmatex, into MathML."""

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match[2]).removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]")
        return convert(tex, display="block" if match[1] == "div" else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, html_text, flags=re.DOTALL)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    config.extra["pages"] = nav
    return nav


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt (llmstxt.org), and the Markdown of each page that it lists."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for page, heading in pages_of(config.extra["pages"].items):
        if heading:
            lines += ["", f"## {heading}", ""]
        markdown = page.file.content_string
        lines.append(f"- [{page.title}]({page.file.src_uri}): {first_sentence(markdown)}")
        copy = site / page.file.src_uri
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(markdown, encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def pages_of(items: Sequence[StructureItem], heading: str = "Start") -> Iterator[tuple[Page, str]]:
    """Yield each page of the navigation, with the heading of its section before the first page of a section."""
    for item in items:
        if isinstance(item, Section):
            yield from pages_of(item.children, item.title)
        elif isinstance(item, Page):
            yield item, heading
            heading = ""


def first_sentence(markdown: str) -> str:
    """The first sentence of a page below its heading, without links and marks."""
    body = CODE_BLOCK.sub("", markdown)
    paragraphs = [part.strip() for part in body.split("\n\n")]
    text = next((part for part in paragraphs if part and not part.startswith(("#", "|", "![", ":::", "*"))), "")
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("\n", " ")
    return re.split(r"(?<=[.:])\s", text, maxsplit=1)[0].rstrip(":")


def outside_links(page: str, text: str) -> Iterator[str]:
    for match in LINK.finditer(CODE_BLOCK.sub("", text)):
        if source := outside_path(page, match[2]):
            yield source


def outside_path(page: str, target: str) -> str | None:
    """The file that a link of a page leads to, from the root of the repository; None if it is in docs/ or elsewhere.

    Pages of files outside docs/ are in ``source/``, under their own path.
    """
    if re.match(r"\w+:|/", target):
        return None
    folder = posixpath.dirname(page.removeprefix("source/") if page.startswith("source/") else f"docs/{page}")
    path = posixpath.normpath(posixpath.join(folder, target))
    in_docs = path.startswith("docs/") and not page.startswith("source/")
    return None if in_docs or not (ROOT / path).is_file() else path


def page_of(source: str) -> str:
    """The page of the site that shows a file: its own page in docs/, or one in source/."""
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return "source/" + (source if source.endswith(".md") else f"{source}.md")


def page_text(source: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(source).suffix, "text")
    return f"# {source}\n\n~~~~ {{.{language} linenums=1}}\n{text}\n~~~~\n"
