"""The recipe that builds Detectron2 0.6: its patches, checks and installed build. No network."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).resolve().parent.parent / "third_party" / "detectron2"


def load(name: str) -> ModuleType:
    """Import a file of the recipe's folder, which is not a package."""
    sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        # Not all that was added: importing setuptools adds what it carries along.
        sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module", autouse=True)
def _forget_recipe_modules() -> Iterator[None]:
    yield
    for name in ("patches", "index_settings", "backend"):
        sys.modules.pop(name, None)


patches = load("patches")
index_settings = load("index_settings")
backend = load("backend")


# -- patches


def write(package: Path, path: str, text: str) -> Path:
    file = package / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def text_for(patch) -> str:
    """A text in which the patch finds what it replaces, as often as it expects."""
    old = patch.old if isinstance(patch.old, str) else "np.float"
    return f"# before\n{old}\n" * patch.count


def shown(patch) -> str:
    return patch.old if isinstance(patch.old, str) else patch.old.pattern


def is_applied(patch, text: str) -> bool:
    """Whether `text` holds none of what the patch replaces, other than in its replacement."""
    if isinstance(patch.old, str):
        return patch.old not in (text.replace(patch.new, "") if patch.new else text)
    return not patch.old.search(text)


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda p: f"{p.path}-{shown(p)[:20]!r}")
class TestEachPatch:
    def test_replaces(self, patch, tmp_path: Path) -> None:
        file = write(tmp_path, patch.path, text_for(patch))
        patch.apply(tmp_path)
        text = file.read_text(encoding="utf-8")
        assert is_applied(patch, text)
        assert text.count("# before") == patch.count
        if isinstance(patch.old, str):
            assert not patch.new or text.count(patch.new) == patch.count

    def test_missing_text_names_file_and_text(self, patch, tmp_path: Path) -> None:
        file = write(tmp_path, patch.path, "nothing of that kind\n")
        with pytest.raises(patches.PatchError) as error:
            patch.apply(tmp_path)
        assert f"detectron2/{patch.path}" in str(error.value)
        assert repr(shown(patch)) in str(error.value)
        assert "found 0" in str(error.value)
        assert file.read_text() == "nothing of that kind\n"

    def test_missing_file_is_named(self, patch, tmp_path: Path) -> None:
        with pytest.raises(patches.PatchError, match="no such file") as error:
            patch.apply(tmp_path)
        assert f"detectron2/{patch.path}" in str(error.value)


def test_numpy_names_are_replaced_whole(tmp_path: Path) -> None:
    patch = next(p for p in patches.PATCHES if p.path == "utils/visualizer.py")
    source = "x.astype(np.bool)\ny = np.bool_(1)\nnp.float32\nnp.int, np.str\nnp.integer\n"
    file = write(tmp_path, patch.path, source)
    patch.apply(tmp_path)
    assert file.read_text() == "x.astype(bool)\ny = np.bool_(1)\nnp.float32\nint, str\nnp.integer\n"


def fake_package(folder: Path) -> Path:
    """A folder in which all patches apply."""
    for patch in patches.PATCHES:
        file = folder / patch.path
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        write(folder, patch.path, before + text_for(patch))
    return folder


def test_stand_in_names_the_operator(tmp_path: Path) -> None:
    package = fake_package(tmp_path)
    patches.apply_patches(package)
    stand_in = ModuleType("_C")
    exec((package / "_C.py").read_text(encoding="utf-8"), stand_in.__dict__)
    assert stand_in.has_cuda() is False
    assert stand_in.get_compiler_version() and stand_in.get_cuda_version()
    assert not hasattr(stand_in, "nms_rotated")
    with pytest.raises(AttributeError, match=r"detectron2\._C\.deform_conv_forward .*INSTALL\.md"):
        _ = stand_in.deform_conv_forward


def test_stand_in_replaces_nothing(tmp_path: Path) -> None:
    package = fake_package(tmp_path)
    write(package, "_C.py", "real = True\n")
    with pytest.raises(patches.PatchError, match=r"_C\.py: already there"):
        patches.apply_patches(package)
    assert (package / "_C.py").read_text() == "real = True\n"


# -- the archive


def test_wrong_hash_names_both_hashes_and_the_size(tmp_path: Path) -> None:
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"<html>")
    with pytest.raises(backend.RecipeError) as error:
        backend.check_hash(archive)
    assert backend.SHA256 in str(error.value)
    assert hashlib.sha256(b"<html>").hexdigest() in str(error.value)
    assert "6 bytes" in str(error.value)


def make_archive(folder: Path) -> Path:
    """A source archive of the real one's shape, in which all patches apply."""
    tree = folder / backend.ARCHIVE_ROOT
    package = fake_package(tree / "detectron2")
    write(package, "__init__.py", "")
    write(package, "projects/__init__.py", "")
    write(package, "model_zoo/configs/LVISv0.5-InstanceSegmentation/a.yaml", "VERSION: 2\n")
    write(package, "model_zoo/configs/common/train.py", "train = {}\n")
    for project in backend.PROJECTS.values():
        write(tree, f"{project}/__init__.py", "")
    archive = folder / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, backend.ARCHIVE_ROOT)
    return archive


def test_sources_are_laid_out_and_patched(tmp_path: Path) -> None:
    archive = make_archive(tmp_path)
    tree = tmp_path / "tree"
    backend.lay_out_sources(archive, tree)
    package = tree / "detectron2"
    assert (package / "_C.py").is_file()
    assert (package / "projects" / "point_rend" / "__init__.py").is_file()
    assert (package / "model_zoo/configs/LVISv0.5-InstanceSegmentation/a.yaml").is_file()
    assert "BILINEAR" in (package / "data/transforms/transform.py").read_text()


def test_an_archive_that_climbs_out_is_refused(tmp_path: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python's tarfile has no filters; the hash is the check there")
    archive = tmp_path / "bad.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo("../outside")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        backend.lay_out_sources(archive, tmp_path / "tree")


def test_metadata_needs_no_sources_and_leaves_nothing(tmp_path: Path) -> None:
    before = sorted(path.name for path in RECIPE.iterdir() if path.name != "__pycache__")
    cwd = Path.cwd()
    name = backend.prepare_metadata_for_build_wheel(str(tmp_path))
    text = (tmp_path / name / "METADATA").read_text(encoding="utf-8")
    assert "Name: detectron2\nVersion: 0.6\n" in text
    assert backend.get_requires_for_build_wheel() == []
    after = sorted(path.name for path in RECIPE.iterdir() if path.name != "__pycache__")
    assert (before, cwd) == (after, Path.cwd())


def test_source_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(backend.UnsupportedOperation):
        backend.build_sdist(str(tmp_path))


# -- pip's settings


def settings(environ: dict[str, str], config: str = "", folder: Path | None = None):
    files = []
    if folder is not None:
        files = [folder / "pip.conf", folder / "missing.conf"]
        files[0].write_text(config, encoding="utf-8")
    return index_settings.IndexSettings.from_pip(environ, files)


def test_index_from_the_environment() -> None:
    found = settings(
        {
            "PIP_INDEX_URL": "https://a.example/simple",
            "PIP_EXTRA_INDEX_URL": "https://b.example/simple https://c.example/simple",
            "PIP_FIND_LINKS": "/wheels",
            "PIP_TRUSTED_HOST": "a.example",
        }
    )
    assert found.index_urls == [f"https://{name}.example/simple" for name in "abc"]
    assert found.find_links == ["/wheels"]
    assert found.trusted_hosts == ["a.example"]


def test_index_from_a_configuration_file(tmp_path: Path) -> None:
    config = (
        "[global]\nindex-url = https://a.example/simple\ncert = /ca.pem\n"
        "[install]\nindex_url = https://b.example/simple\nfind-links =\n    /one\n    /two\n"
    )
    found = settings({}, config, tmp_path)
    assert found.index_urls == ["https://b.example/simple"]
    assert found.find_links == ["/one", "/two"]
    assert found.certificate == "/ca.pem"
    found = settings({"PIP_INDEX_URL": "https://c.example/simple"}, config, tmp_path)
    assert found.index_urls == ["https://c.example/simple"]


def test_a_broken_configuration_file_is_left_to_pip(tmp_path: Path) -> None:
    found = settings({"PIP_INDEX_URL": "https://a.example"}, "index-url = no section", tmp_path)
    assert found.index_urls == ["https://a.example"]


def test_no_index_leaves_links_alone() -> None:
    found = settings({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"})
    assert (found.index_urls, found.find_links) == ([], ["/wheels"])


def test_index_from_uv() -> None:
    found = settings({"UV_DEFAULT_INDEX": "mine=https://a.example/simple"})
    assert found.index_urls == ["https://a.example/simple"]


def test_passwords_are_not_shown() -> None:
    found = settings({"PIP_INDEX_URL": "https://user:secret@a.example/simple"})
    assert str(found) == "https://a.example/simple"
    assert found.index_urls == ["https://user:secret@a.example/simple"]


def test_pip_configuration_can_be_switched_off() -> None:
    assert index_settings.pip_config_files({"PIP_CONFIG_FILE": "/dev/null"}) == []


# -- the build that is installed


@pytest.fixture
def installed() -> Path:
    """The folder of the installed detectron2, if our recipe built it."""
    distribution = importlib.metadata.distribution("detectron2")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    summary = distribution.metadata["Summary"] or ""
    if "without compiled operators" not in summary:
        pytest.skip(f"the installed detectron2 is not the recipe's build (from {origin or '?'})")
    return Path(str(distribution.locate_file("detectron2")))


def test_installed_build_is_patched(installed: Path) -> None:
    for patch in patches.PATCHES:
        text = (installed / patch.path).read_text(encoding="utf-8")
        assert is_applied(patch, text), patch
    assert (installed / "_C.py").read_text(encoding="utf-8") == patches.STAND_IN


def test_installed_build_has_the_zoo_configs(installed: Path) -> None:
    configs = installed / "model_zoo" / "configs"
    assert len(list(configs.rglob("*.yaml"))) == 92
    assert len(list(configs.rglob("*.py"))) == 36


def test_installed_build_finds_a_config_and_imports_what_needed_patches(installed: Path) -> None:
    for name in ("engine", "evaluation", "export", "projects.point_rend", "utils.analysis"):
        importlib.import_module(f"detectron2.{name}")
    from detectron2 import model_zoo

    file = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    assert Path(file).is_file()
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        model_zoo.get_config_file("COCO-Detection/no_such.yaml")
