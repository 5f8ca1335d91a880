"""Hook of mkdocs: pages of the site that are files outside of docs/, and links to them.

README.md is the first page. Links are written as the repository needs them: one of docs/ to `../NOTICE` becomes a link
to the page that is made here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "NOTICE": "NOTICE.md",
    **{f"brixel_cli/students/{path.name}": f"students/{path.name}" for path in ROOT.glob("brixel_cli/students/*.md")},
}
"""Where a file of the repository stands on the site, relative to docs/."""
LINK = re.compile(r"(\]\(|src=\")(?!https?:|#|mailto:)([^)#\s\"]+)")


def on_config(config: Any) -> Any:
    """Pages that the navigation does not name come at its end."""
    docs = Path(config["docs_dir"])
    named = str(config["nav"])
    others = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    more = [page for page in others if f"'{page}'" not in named and page != "results/notes.md"]
    config["nav"] += [{"More": more}] if more else []
    return config


def on_files(files: Any, config: Any) -> Any:
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = f"# Licences\n\n```text\n{text}```\n" if source == "NOTICE" else relinked(text, source, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    name = page.file.src_uri
    return markdown if name in OUTSIDE.values() else relinked(markdown, f"docs/{name}", name)


def relinked(text: str, source: str, page: str) -> str:
    """Text of a file with the links that its page needs."""
    home = Path(source).parent

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(home / found[2])).as_posix()
        place = OUTSIDE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return found[0] if place is None else found[1] + os.path.relpath(place, Path(page).parent)

    return LINK.sub(link, text)
