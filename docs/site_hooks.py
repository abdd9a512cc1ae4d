"""Hooks of the documentation site: pages of the repository's root, and links that leave docs/.

README.md, CONTRIBUTING.md and others are pages of the site too. Their links, and links from docs/ to them,
are written for GitHub and rewritten here. A link to a file that exists in the repository but is no page
becomes plain text; any other broken link stays and fails the strict build.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# File in the root of the repository: its page.
ROOT_PAGES = {
    "README.md": "index.md",
    "README_zh.md": "index_zh.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_ORIGINS = {page: file for file, page in ROOT_PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    origin = _ORIGINS.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    up = "../" * page.file.src_uri.count("/")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if re.match(r"\w+:", target):
            return link[0]
        path = (ROOT / origin).parent.joinpath(target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return link[0]
        name = path.relative_to(ROOT).as_posix()
        uri = ROOT_PAGES.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if uri is None or files.get_file_from_path(uri) is None:
            return text
        return f"[{text}]({up}{uri}{anchor})"

    # Code blocks are left alone.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else _LINK.sub(rewritten, part) for part in parts)
