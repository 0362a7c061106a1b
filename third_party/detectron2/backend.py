"""PEP 517 backend: download Detectron2 0.6, patch it, build a pure-Python wheel.

All work happens in a temporary folder, so that a build leaves nothing beside this file and can be
repeated. Two builds of the same patches give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from index_settings import IndexSettings
from patches import apply_patches
from setuptools import build_meta

Settings = Mapping[str, Any] | None  # what a front end passes on from its command line

HERE = Path(__file__).resolve().parent

# The project that carries tag v0.6's Python files, its configs and its small projects. It is not
# installed itself: its metadata cannot be built without torch, and its extension cannot be
# compiled since the archive lacks the C++ sources.
REQUIREMENT = "pb1-detectron2==0.6"
ARCHIVE_ROOT = "pb1-detectron2-0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# Detectron2's own setup.py installs these three under detectron2.projects.
PROJECTS = {
    "point_rend": "projects/PointRend/point_rend",
    "deeplab": "projects/DeepLab/deeplab",
    "panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}

# The time of every file in the wheel (2021-11-15, the month of v0.6), so that builds repeat byte
# by byte.
SOURCE_DATE_EPOCH = "1636934400"


class RecipeError(RuntimeError):
    """The sources could not be had, or are not the ones that the patches were written for."""


class UnsupportedOperation(Exception):
    """Named by PEP 517: what this backend does not do."""


def download(folder: Path) -> Path:
    """Download the source archive into `folder` from the index that pip is set up for."""
    from unearth import PackageFinder

    settings = IndexSettings.from_pip()
    settings.export_certificates()
    hint = (
        f"Looked in: {settings}. The settings of pip and uv (index, extra index, find-links, "
        "certificate) are read from their environment variables and pip's configuration files. "
        "Without a network, put the source archive into a folder and set PIP_FIND_LINKS to it "
        "and PIP_NO_INDEX=1."
    )
    name = REQUIREMENT.partition("==")[0]
    try:
        finder = PackageFinder(
            index_urls=settings.index_urls,
            find_links=settings.find_links,
            trusted_hosts=settings.trusted_hosts,
            no_binary=[name],
        )
        match = finder.find_best_match(REQUIREMENT).best
        if match is None:
            raise RecipeError(
                f"Cannot build detectron2: no source archive of {REQUIREMENT} was found. {hint}"
            )
        # An archive that lies on this machine already is not copied: its own path comes back.
        return finder.download(match.link, folder)
    except RecipeError:
        raise
    except Exception as error:  # those of unearth's HTTP library, which has changed before
        raise RecipeError(
            f"Cannot build detectron2: downloading {REQUIREMENT} failed with "
            f"{type(error).__name__}: {error}. {hint}"
        ) from error


def check_hash(archive: Path) -> None:
    """Refuse an archive other than the one the patches were written for."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise RecipeError(
            f"Cannot build detectron2: {archive.name} ({archive.stat().st_size} bytes) has "
            f"sha256 {found}, expected {SHA256}. The download was cut short, or the index "
            "serves another file under that name."
        )


def lay_out_sources(archive: Path, tree: Path) -> None:
    """Unpack `archive` and put the patched package into `tree`."""
    with tempfile.TemporaryDirectory() as tmp:
        with tarfile.open(archive) as tar:
            # The filter is new in the security releases of 3.10 and 3.11; the hash vouches for
            # the content either way.
            if hasattr(tarfile, "data_filter"):
                tar.extractall(tmp, filter="data")
            else:
                tar.extractall(tmp)
        source = Path(tmp) / ARCHIVE_ROOT
        package = tree / "detectron2"
        shutil.copytree(source / "detectron2", package)
        for name, folder in PROJECTS.items():
            shutil.copytree(source / folder, package / "projects" / name)
    apply_patches(package)


@contextlib.contextmanager
def project_tree() -> Iterator[Path]:
    """A temporary project folder with this folder's metadata, as the working directory."""
    before = Path.cwd()
    os.environ.setdefault("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH)
    with tempfile.TemporaryDirectory(prefix="detectron2-build-") as tmp:
        tree = Path(tmp) / "tree"
        tree.mkdir()
        for name in ("pyproject.toml", "LICENSE"):
            shutil.copy(HERE / name, tree)
        os.chdir(tree)
        try:
            yield tree
        finally:
            os.chdir(before)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Name nothing: setuptools' own hook would look for the sources, not there yet."""
    return []


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Write the metadata. That needs no download, so a resolver can ask for it cheaply."""
    target = Path(metadata_directory).resolve()
    with project_tree() as tree:
        (tree / "detectron2").mkdir()
        (tree / "detectron2" / "__init__.py").touch()
        return build_meta.prepare_metadata_for_build_wheel(str(target), config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Download, check, patch and build."""
    target = Path(wheel_directory).resolve()
    metadata = str(Path(metadata_directory).resolve()) if metadata_directory else None
    with project_tree() as tree:
        archive = download(tree.parent)
        check_hash(archive)
        lay_out_sources(archive, tree)
        return build_meta.build_wheel(str(target), config_settings, metadata)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Refused: the sources are not ours to pack again."""
    raise UnsupportedOperation("detectron2's recipe builds wheels alone")
