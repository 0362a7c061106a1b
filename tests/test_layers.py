"""Imports point downward only: the layers of the design, read off the import statements."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ssim_kd"

# The longest prefix counts. A module that fits none fails the test: give it its place here, on
# purpose.
LAYERS = {
    "ssim_kd": 4,  # the package's face: no module inside imports it
    "ssim_kd.engine": 4,
    "ssim_kd.modeling": 3,  # the sub-package's face
    "ssim_kd.modeling.meta_arch": 3,
    "ssim_kd.modeling.distiller": 2,
    "ssim_kd.modeling.feature_distiller": 2,
    "ssim_kd.modeling.levels": 2,
    "ssim_kd.modeling.teacher": 2,
    "ssim_kd.modeling.teacher_config": 2,
    "ssim_kd.modeling.timm_backbone": 2,
    "ssim_kd.modeling.external_teacher": 1,
    "ssim_kd.checkpoint": 2,
    "ssim_kd.modeling.adapters": 1,
    "ssim_kd.modeling.batch": 1,
    "ssim_kd.modeling.folding": 1,
    "ssim_kd.modeling.taps": 1,
    "ssim_kd.config": 1,
    "ssim_kd.config_files": 1,
    "ssim_kd.data": 1,
    "ssim_kd.locks": 0,
    "ssim_kd.visualization": 1,
    "ssim_kd.losses": 0,
    "ssim_kd.ops": 0,
}
FACES = {"ssim_kd", "ssim_kd.modeling"}  # these cover their __init__.py alone, not what lies below

LAYER_0_MAY_IMPORT = {"portalocker", "torch", "triton", "ssim_kd"} | set(sys.stdlib_module_names)
ENTRY_POINTS = {"projects", "tools", "train_net", "tests"}


def module_name(file: Path) -> str:
    """The dotted name of a file below ROOT; a package for its __init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def walk(node: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """`ast.walk`, which leaves out the bodies of functions where told to."""
    for child in ast.iter_child_nodes(node):
        yield child
        if functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from walk(child, functions=functions)


def imported_modules(
    source: str, module: str, is_package: bool, *, deferred: bool = True
) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) for each import in `source`, relative ones resolved.

    `deferred`: also those inside functions, which run later than the module's own import.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in walk(ast.parse(source), functions=deferred):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join(base + (node.module.split(".") if node.module else []))
            for alias in node.names:
                # `from ssim_kd.modeling import taps` names a module, `... import FeatureTap` the
                # package's face.
                below = f"{target}.{alias.name}"
                inside = target.split(".")[0] == "ssim_kd"
                yield node.lineno, below if inside and exists(below) else target


def layer(module: str) -> int:
    """The layer of a module of the package; KeyError where the table has none."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in LAYERS and (prefix not in FACES or prefix == module):
            return LAYERS[prefix]
    raise KeyError(f"{module} has no layer: give it its place in tests/test_layers.py")


def imports_of(file: Path, *, deferred: bool = True) -> list[tuple[int, str]]:
    source, is_package = file.read_text(encoding="utf-8"), file.name == "__init__.py"
    return sorted(set(imported_modules(source, module_name(file), is_package, deferred=deferred)))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_downward(file: Path) -> None:
    module = module_name(file)
    own = layer(module)
    upward = [
        f"{file.relative_to(ROOT)}:{line}: {module} (layer {own}) imports {name} (layer "
        f"{layer(name)})"
        for line, name in imports_of(file)
        if name.split(".")[0] == "ssim_kd" and layer(name) > own
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_the_core_never_imports_entry_points(file: Path) -> None:
    bad = [(line, name) for line, name in imports_of(file) if name.split(".")[0] in ENTRY_POINTS]
    assert not bad, f"{file.relative_to(ROOT)} imports {bad}"


@pytest.mark.parametrize("file", [f for f in FILES if layer(module_name(f)) == 0], ids=module_name)
def test_layer_0_knows_torch_alone(file: Path) -> None:
    bad = [
        (line, name)
        for line, name in imports_of(file)
        if name.split(".")[0] not in LAYER_0_MAY_IMPORT
    ]
    assert not bad, f"{file.relative_to(ROOT)} imports {bad}"


def test_modules_import_each_other_in_no_circle() -> None:
    # Faces are left out: they gather what lies below them. So are imports inside functions: they
    # close no circle while modules are being imported.
    graph = {
        module_name(file): {name for _, name in imports_of(file, deferred=False)}
        for file in FILES
        if file.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for name in graph.get(module, ()):
            visit(name, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("source", "module", "is_package", "expected"),
    [
        ("import torch.nn", "ssim_kd.losses.lp", False, "torch.nn"),
        ("from .ssim import ssim_loss", "ssim_kd.losses", True, "ssim_kd.losses.ssim"),
        ("from ..config import x", "ssim_kd.modeling.taps", False, "ssim_kd.config"),
        ("from ssim_kd import config", "ssim_kd.losses.lp", False, "ssim_kd.config"),
        ("from ssim_kd import __version__", "ssim_kd.losses.lp", False, "ssim_kd"),
        ("def f():\n    import projects.PKD", "ssim_kd.config", False, "projects.PKD"),
    ],
)
def test_the_reader_of_imports(source: str, module: str, is_package: bool, expected: str) -> None:
    assert [name for _, name in imported_modules(source, module, is_package)] == [expected]


def test_a_module_without_a_layer_is_refused() -> None:
    with pytest.raises(KeyError, match=r"ssim_kd\.modeling\.new_idea has no layer"):
        layer("ssim_kd.modeling.new_idea")
