"""What the site has beside `docs/`: pages of the root, and the files of the repository that pages link to."""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
FOLDER = "repository"
"""Folder of the site that holds the repository's own files, as plain text."""
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie in the repository's root, where its readers look for them."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave `docs/` lead to a page or a file of the site."""
    here = page.file.src_uri
    folder = PurePosixPath(here if here in PAGES else f"docs/{here}").parent

    def lead(link: re.Match[str]) -> str:
        target = normpath(folder / link[2])
        if target.startswith("docs/"):
            found = target.removeprefix("docs/")
        elif target in PAGES:
            found = target
        elif (ROOT / target).is_file():
            found = f"{FOLDER}/{target}.txt"
            if files.get_file_from_path(found) is None:
                files.append(File.generated(config, found, content=(ROOT / target).read_bytes()))
        else:
            return link[0]  # found nowhere: the build says so
        return f"{link[1]}{relpath(found, PurePosixPath(here).parent.as_posix())}{link[3] or ''}{link[4]}"

    return LINK.sub(lead, markdown)
