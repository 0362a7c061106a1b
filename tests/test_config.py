"""The config keys: each has a comment, and is read by something."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec

from ssim_kd.config import (
    add_distill_config,
    notes_on,
    read_classes,
    student_config,
    write_stock_config,
)
from ssim_kd.modeling import DISTILLER_REGISTRY, build_distillers
from tests.helpers import distilled_config, full_config, stock_config

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    file
    for folder in ("ssim_kd", "projects")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "tests" not in file.parts
]
DECLARATIONS = [ROOT / "ssim_kd" / "config.py", *sorted((ROOT / "projects").glob("*/*/config.py"))]


def new_keys(node: CfgNode, known: CfgNode, prefix: str = "") -> Iterator[str]:
    """The dotted name of every leaf that Detectron2 itself does not have."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from new_keys(value, known.get(key, CfgNode()), f"{prefix}{key}.")
        elif key not in known:
            yield prefix + key


KEYS = sorted(new_keys(full_config(), get_cfg()))


def attributes_read(source: str) -> Iterator[str]:
    """ "OWNER.NAME" of every attribute that is read, and "OWNER.*" if all of OWNER is.

    A variable is the attribute that it was assigned: a = b.OWNER makes a.NAME OWNER.NAME.
    """
    tree = ast.parse(source)
    aliases = {
        target.id: node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def name_of(owner: ast.expr) -> str:
        if isinstance(owner, ast.Attribute):
            return owner.attr
        return aliases.get(owner.id, owner.id) if isinstance(owner, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield f"{name_of(node.value)}.{'*' if node.attr == 'items' else node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "_pair"):
            owner, *names = node.args
            yield from (f"{name_of(owner)}.{x.value}" for x in names if isinstance(x, ast.Constant))


READ = {name for file in SOURCES for name in attributes_read(file.read_text(encoding="utf-8"))}
#: By the methods, which declare their keys.
READ |= {
    key if "." in key else f"DISTILL.{key}"
    for _, method in DISTILLER_REGISTRY
    for key in method.all_keys().values()
}


def test_the_keys_are_found() -> None:
    for key in ("MODEL.DISTILL.LOSS", "MODEL.DISTILL.PKD.EPS", "DATASETS.DIGITS.SEED"):
        assert key in KEYS
    assert "MODEL.WEIGHTS" not in KEYS


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read(key: str) -> None:
    node, name = key.split(".")[-2:]
    found = {f"{node}.{name}", f"{node}.*"} & READ
    named = any(f'"{key}"' in file.read_text(encoding="utf-8") for file in SOURCES)
    assert found or named, f"nothing in ssim_kd/ or projects/ reads {key}"


def test_the_reader_of_attributes() -> None:
    source = """
a.SSIM.items()
b.WRITTEN = c.MODEL.READ
d = c.DIGITS
print('TEXT', getattr(d, 'NAMED'), d.SEED)
"""
    assert set(attributes_read(source)) == {
        *("a.SSIM", "SSIM.*", "c.MODEL", "MODEL.READ", "c.DIGITS", "DIGITS.NAMED", "DIGITS.SEED")
    }


def declared(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every key with a value; nodes that hold keys are left out."""
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or "add_" not in function.name:
            continue
        for node in function.body:
            if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
                for target in node.targets:
                    if isinstance(target, ast.Attribute) and target.attr.isupper():
                        yield node.lineno, target.attr


@pytest.mark.parametrize("file", DECLARATIONS, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_key_has_a_comment_above_it(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    keys = list(declared(source))
    assert keys
    numbers = {line for line, _ in keys}
    for number, name in keys:
        above = number - 1
        while above in numbers:  # keys in a row, such as K1 and K2, share one comment
            above -= 1
        assert lines[above - 1].strip().startswith("#"), f"{file}:{number}: {name} is not explained"


def test_every_new_key_is_declared_in_a_config_file() -> None:
    names = {name for f in DECLARATIONS for _, name in declared(f.read_text(encoding="utf-8"))}
    assert {key.rsplit(".", 1)[-1] for key in KEYS} <= names


def test_no_key_of_detectron2s_is_changed() -> None:
    stock, ours = get_cfg(), get_cfg()
    add_distill_config(ours)

    def compare(one: CfgNode, other: CfgNode, prefix: str = "") -> None:
        for key, value in one.items():
            if isinstance(value, CfgNode):
                compare(value, other[key], f"{prefix}{key}.")
            else:
                assert other[key] == value, prefix + key

    compare(stock, ours)


def test_the_students_config_is_its_own() -> None:
    cfg = distilled_config("retinanet", "faster", "weights.pth")
    found = student_config(cfg)
    assert found.MODEL.META_ARCHITECTURE == "RetinaNet" and found.is_frozen()
    assert cfg.MODEL.META_ARCHITECTURE == "DistilledDetector" and not cfg.is_frozen()
    plain = stock_config("faster")
    add_distill_config(plain)
    assert student_config(plain).MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def test_the_written_config_is_read_by_stock_detectron2(tmp_path) -> None:
    cfg = distilled_config("retinanet", "faster", "weights.pth", "SOLVER.BASE_LR", 0.123)
    write_stock_config(cfg, str(tmp_path / "stock.yaml"))
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "stock.yaml"))
    assert stock.MODEL.META_ARCHITECTURE == "RetinaNet" and stock.SOLVER.BASE_LR == 0.123
    expected = stock_config("retinanet", "SOLVER.BASE_LR", 0.123)
    # As JSON, for YAML makes lists of inner tuples.
    assert json.dumps(stock, sort_keys=True) == json.dumps(expected, sort_keys=True)


# What a user changes reaches what it is for


@pytest.fixture(scope="module")
def distiller_of():
    def build(*opts):
        cfg = full_config()
        cfg.merge_from_list([f"MODEL.DISTILL.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)])
        ours = {"p3": ShapeSpec(channels=4, stride=8)}
        theirs = {"p3": ShapeSpec(channels=6, stride=8)}
        (distiller,) = build_distillers(cfg)
        distiller.bind_shapes(ours, theirs)
        return distiller

    return build


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SSIM.WINDOW_SIZE", 7),
        ("SSIM.SIGMA", 2.0),
        ("SSIM.K1", 0.02),
        ("SSIM.K2", 0.05),
        ("SSIM.DATA_RANGE", 3.0),
        ("SSIM.ALPHA", 0.0),
        ("SSIM.BETA", 2.0),
        ("SSIM.GAMMA", 0.5),
        ("SSIM.PADDING", "valid"),
        ("SSIM.IMPL", "reference"),
        ("SCALING", "batch"),
        ("SCALING_GRAD", False),
    ],
)
def test_an_option_reaches_the_loss(key, value, distiller_of) -> None:
    name = re.sub(r"^SSIM\.", "", key).lower()
    assert distiller_of(key, value).options[name] == value
    assert distiller_of().options[name] != value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("LOSS", "l1", {"name": "l1"}),
        ("LEVEL_WEIGHTS", [3.0], {"level_weights": [3.0]}),
        ("MASK_PADDING", False, {"mask_padding": False}),
        ("RESIZE", "bilinear", {"resize": "bilinear"}),
    ],
)
def test_an_option_reaches_the_distiller(key, value, expected, distiller_of) -> None:
    (name,) = expected
    assert getattr(distiller_of(key, value), name) == expected[name]
    assert getattr(distiller_of(), name) != expected[name]


def test_the_loss_weight_reaches_the_distiller(distiller_of) -> None:
    assert distiller_of("LOSS_WEIGHT", 2.5).weight(0.5) == 2.5
    assert distiller_of().weight(0.5) == 4.0


@pytest.mark.parametrize(
    "name", ["a\nX: 1", "a\u2028X: !!python/object/apply:os.system [x]", "\x85X: 1"]
)
def test_names_of_classes_are_no_keys(name, tmp_path) -> None:
    """Of a data set that was received: a comment of YAML ends at each of these line breaks."""
    path = tmp_path / "student.yaml"
    path.write_text(notes_on("model.pth", [name]) + "VERSION: 2\n")
    assert yaml.safe_load(path.read_text()) == {"VERSION": 2}
    assert read_classes(str(path)) == [name]
