"""The pages that mkdocs.yml adds to docs/ from elsewhere in the repository, and their links.

README.md is the front page, the README of each project a page of the methods, and the reference of
the config keys is made. Pages keep the links that they have in the repository: a link to a file
that is a page here leads to the page; one to any other file becomes plain text.
"""

import os
import posixpath
import re
import sys
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.config_reference import reference  # noqa: E402

PROJECTS = sorted(
    (p.parent for p in ROOT.glob("projects/*/README.md")), key=lambda p: p.name.lower()
)
#: Files and folders of the repository: the page of each.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "studies/README.md": "studies.md",
    "projects/README.md": "methods/index.md",
    "projects/PROVENANCE.md": "methods/provenance.md",
    **{f"projects/{p.name}/README.md": f"methods/{p.name}.md" for p in PROJECTS},
    "ssim_kd/config.py": "configuration.md",
}
FOLDERS = {posixpath.dirname(file): page for file, page in PAGES.items() if "/README" in file}
ORIGINS = {page: file for file, page in PAGES.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the methods into the navigation, and what mkdocs.yml names nowhere at the end of Use."""
    assert config.nav is not None
    parts = {title: pages for part in config.nav for title, pages in part.items()}
    parts["Methods"] += [{p.name: f"methods/{p.name}.md"} for p in PROJECTS]
    named = {page for pages in parts.values() for entry in pages for page in entry.values()}
    parts["Use"] += sorted({p.name for p in ROOT.glob("docs/*.md")} - named)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere."""
    for origin, page in PAGES.items():
        if origin.endswith(".py"):
            files.append(File.generated(config, page, content=reference()))
        else:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / origin)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links of the repository to pages."""
    here = page.file.src_uri
    origin = ORIGINS.get(here, f"docs/{here}")
    if origin.endswith(".py"):  # a made page: links from the root
        origin = ""

    def lead(match: re.Match[str]) -> str:
        label, target, fragment = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        found = PAGES.get(path) or FOLDERS.get(path)
        if found is None and path.startswith("docs/"):
            found = path.removeprefix("docs/")
        if found is None:
            return label
        relative = os.path.relpath(found, posixpath.dirname(here) or ".")
        return f"[{label}]({relative}{fragment or ''})"

    return re.sub(r"\[([^\]\[]*)\]\((?!\w+://|#)([^)\s#]+)(#[^)\s]*)?\)", lead, markdown)


class RolesAsCode(griffe.Extension):
    """Sphinx's roles and literal blocks in docstrings, in Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.M)
            # "a, b: text" of attributes: griffe takes what follows a space for a type.
            obj.docstring.value = re.sub(
                r"^ +\w+(, \w+)+:", lambda m: m[0].replace(", ", ",\u2009"), text, flags=re.M
            )
