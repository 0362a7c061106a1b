"""The documentation site: it builds without a warning and whole, and needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg

import ssim_kd
import ssim_kd.losses
from tests.helpers import full_config
from tools import config_reference, docs_site

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder


def test_site_has_every_page(site: Path) -> None:
    pages = [p.relative_to(ROOT / "docs").with_suffix(".html") for p in ROOT.glob("docs/*.md")]
    pages += [Path(page).with_suffix(".html") for page in docs_site.PAGES.values()]
    front = (site / "index.html").read_text(encoding="utf-8")
    for page in pages:
        assert (site / page).is_file()
        # In the navigation, which every page has; tabs name the first page of each.
        there = (site / page).read_text(encoding="utf-8")
        assert "md-nav__link--active" in there, page
    assert {"methods/CWD.html", "configuration.html"} <= {str(p) for p in pages}
    assert 'href="methods/index.html"' in front


def test_site_loads_nothing_from_the_network(site: Path) -> None:
    loads = re.compile(
        r"""<(?:script|img|iframe|source|video)[^>]*\ssrc=["']?(?:https?:)?//[^>]*>"""
        r"""|<link(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*href=["']?(?:https?:)?//[^>]*>"""
    )
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page.name
    for sheet in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)]*", sheet.read_text())
        assert not found, sheet.name


def test_python_page_has_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    shown = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="(ssim_kd[\w.]+)"', page)}
    losses = set(ssim_kd.losses.__all__)
    missing = {*ssim_kd.__all__, *losses} - {"__version__"} - shown
    assert not missing, missing


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_configuration_has_every_key_with_its_default(site: Path) -> None:
    stock = dict(leaves(get_cfg()))
    expected = {k: v for k, v in leaves(full_config()) if k not in stock}
    files = [ROOT / "ssim_kd/config.py", *config_reference.project_files()]
    groups = [group for file in files for group in config_reference.read_keys(file)]
    assert {f"{g.node}.{key}": default for g in groups for key, default in g.keys} == expected
    page = (site / "configuration.html").read_text(encoding="utf-8")
    for key in expected:
        assert f'id="{key}"' in page


def test_read_keys_comment_of_several_lines_and_keys(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(
        "def add_config(cfg):\n"
        "    node = cfg.MODEL.DISTILL.MYKD = CN()\n"
        "    # One line,\n    # and another.\n"
        "    node.ALPHA = 1.0\n    node.BETA = [2]\n"
        "    # Of the solver.\n    cfg.SOLVER.GAMMA = ''\n"
    )
    first, second = config_reference.read_keys(file)
    assert first == (
        "MODEL.DISTILL.MYKD",
        [("ALPHA", 1.0), ("BETA", [2])],
        "One line, and another.",
    )
    assert second == ("SOLVER", [("GAMMA", "")], "Of the solver.")
    file.write_text("def add_config(cfg):\n    cfg.MODEL.ALPHA = 1.0\n")
    with pytest.raises(ValueError, match=r"MODEL\.ALPHA"):
        list(config_reference.read_keys(file))


def test_on_config_lists_pages_that_are_not_named() -> None:
    config: Any = SimpleNamespace(nav=[{"Use": [{"Data": "data.md"}]}, {"Methods": []}])
    docs_site.on_config(config)
    use, methods = (pages for part in config.nav for pages in part.values())
    assert use[0] == {"Data": "data.md"} and "faq.md" in use and "data.md" not in use
    assert {"CWD": "methods/CWD.md"} in methods


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "[x](docs/data.md#test-keys)", "[x](data.md#test-keys)"),
        ("index.md", "[x](projects/README.md)", "[x](methods/index.md)"),
        ("index.md", "[x](ssim_kd/config.py)", "[x](configuration.md)"),
        ("index.md", "[x](docs/assets/demo.png)", "[x](assets/demo.png)"),
        ("data.md", "[x](../studies/README.md)", "[x](studies.md)"),
        ("methods/DKD.md", "[x](../CWD)", "[x](CWD.md)"),
        ("methods/DKD.md", "[x](../ReviewKD/configs)", "x"),
        ("methods/DKD.md", "[x](../../docs/data.md)", "[x](../data.md)"),
        ("methods/DKD.md", "[x](https://arxiv.org/abs/1)", "[x](https://arxiv.org/abs/1)"),
        ("configuration.md", "[x](projects/DKD)", "[x](methods/DKD.md)"),
        ("data.md", "[x](#classes)", "[x](#classes)"),
    ],
)
def test_on_page_markdown_leads_links_to_pages(page: str, link: str, expected: str) -> None:
    here: Any = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    unused: Any = None
    assert docs_site.on_page_markdown(link, here, unused, unused) == expected
