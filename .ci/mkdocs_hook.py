"""The site's pages that lie outside docs/: README as the home page, CONTRIBUTING, CHANGELOG and SECURITY.

They are read where GitHub shows them, so that no text exists twice; their links are rewritten for the site.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", rewritten, (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def rewritten(link: re.Match[str]) -> str:
    """A link of the repository's front page as one of the site; what the site does not hold loses its link."""
    text, target = link.groups()
    if re.match(r"https?:|#", target):
        return link[0]
    path, *fragment = target.split("#")
    if path.startswith("docs/"):
        path = path.removeprefix("docs/")
    elif path in PAGES:
        path = PAGES[path]
    elif (ROOT / path).exists():
        return text
    return f"[{text}]({'#'.join([path, *fragment])})"  # mkdocs names a page that does not exist
