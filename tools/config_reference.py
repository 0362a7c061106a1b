"""The page of all config keys, from the comments above them in the files that add them.

Nothing is imported: the files are parsed. A key without a comment shares that of the keys above it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

INTRO = """\
# Configuration

All keys that are added to Detectron2's, with their defaults; made from the comments in
`ssim_kd/config.py` and in the `config.py` of each project. A key is set in a config file, or as
`KEY VALUE` at the end of a command. What is not listed is Detectron2's own.
"""


class Keys(NamedTuple):
    """Keys of one node that share a comment: (name, default) each."""

    node: str
    keys: list[tuple[str, Any]]
    comment: str


def read_keys(file: Path) -> Iterator[Keys]:
    """The keys that the functions of a config file add, in their order.

    Raises:
        ValueError: a key without a comment, at the head of a node.
    """
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    group = Keys("", [], "")
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or "add_" not in function.name:
            continue
        names = {"cfg": ""}  # the node that each variable names
        for line in (x for x in function.body if isinstance(x, ast.Assign)):
            *_, target = line.targets
            if not isinstance(line.value, ast.Call | ast.Attribute):
                node, _, key = _dotted(target, names).rpartition(".")
                comment = _comment_above(lines, line.lineno)
                if comment or node != group.node:
                    if group.keys:
                        yield group
                    if not comment:
                        raise ValueError(f"{file}, line {line.lineno}: {node}.{key} has no comment")
                    group = Keys(node, [], comment)
                group.keys.append((key, ast.literal_eval(line.value)))
            elif isinstance(line.targets[0], ast.Name) and line.targets[0].id != "cfg":
                called = isinstance(line.value, ast.Call)
                names[line.targets[0].id] = _dotted(target if called else line.value, names)
    if group.keys:
        yield group


def _dotted(expression: ast.expr, names: dict[str, str]) -> str:
    """``distill.TEACHER`` as MODEL.DISTILL.TEACHER."""
    if isinstance(expression, ast.Name):
        return names[expression.id]
    assert isinstance(expression, ast.Attribute), ast.unparse(expression)
    return f"{_dotted(expression.value, names)}.{expression.attr}".lstrip(".")


def _comment_above(lines: list[str], number: int) -> str:
    """The comment that ends above a line, which is counted from 1."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.lstrip().startswith("#"):
            break
        found.insert(0, line.lstrip()[1:].strip())
    return " ".join(found)


def project_files() -> list[Path]:
    """The config.py of each project."""
    return sorted(ROOT.glob("projects/*/*/config.py"), key=lambda p: p.parts[-3].lower())


def reference() -> str:
    """The page, in Markdown."""
    parts = [INTRO, *_tables(ROOT / "ssim_kd/config.py")]
    parts.append("## Keys of the methods\n")
    for file in project_files():
        tables = list(_tables(file, level=3))
        name = file.parts[-3]
        parts += [tables[0].replace("\n", f"\n\nOf [{name}](projects/{name}).\n", 1), *tables[1:]]
    return "\n".join(parts)


def _tables(file: Path, level: int = 2) -> Iterator[str]:
    nodes: dict[str, list[str]] = {}
    for node, keys, comment in read_keys(file):
        cells = [
            "<br>".join(f"`{key}`{{ #{node}.{key} }}" for key, _ in keys),
            "<br>".join(f"`{_written(default)}`" for _, default in keys),
            re.sub(r"([\[\]|*_<>`\\])", r"\\\1", comment),
        ]
        nodes.setdefault(node, []).append(f"| {' | '.join(cells)} |\n")
    for node, rows in nodes.items():
        table = "| key | default | meaning |\n|---|---|---|\n" + "".join(rows)
        yield f'{"#" * level} {node}\n\n<div class="keys" markdown>\n\n{table}\n</div>\n'


def _written(default: Any) -> str:
    return '""' if default == "" else repr(default).replace("'", '"').replace("|", "\\|")
