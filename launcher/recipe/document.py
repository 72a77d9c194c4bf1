"""One YAML file as plain values, with the line on which each key was written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import Problem, UserError
from launcher.recipe.origin import Origin, shown

Key = tuple[str | int, ...]
"""Steps from the top of a recipe to a value: names of keys and positions in lists."""


def dotted(key: Key) -> str:
    """`data.train.0.path`."""
    return ".".join(str(part) for part in key)


@dataclass(frozen=True)
class Finding:
    """One mistake and where it was made; becomes a Problem once all are known and in order."""

    origin: Origin
    key: Key
    message: str
    hint: str | None = None

    def problem(self) -> Problem:
        """As it is reported."""
        return Problem(str(self.origin), dotted(self.key), self.message, self.hint)


@dataclass
class Document:
    """Values with their origins; sections and lists have an origin as well as leaves."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


class Reader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2.

    YAML 1.1, which PyYAML follows, reads `2e-5` as text, `on` and `no` as booleans, `1:30` as 90 and `010` as 8.
    """


SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
Reader.yaml_implicit_resolvers = {}
for _name, _pattern in SCALARS.items():
    Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), None)


def read(path: Path) -> Document:
    """Read one recipe file. What is wrong with its YAML is in `findings`. Raises UserError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{shown(path)}: cannot be read: {reason}", "a recipe is a YAML file") from error

    document = Document()
    node = _compose(text, document, path)
    if node is None:
        return document
    value = _Walk(document, path).value(node, ())
    if isinstance(value, dict):
        document.values = value
    else:
        origin = Origin("file", path, node.start_mark.line + 1)
        document.findings.append(Finding(origin, (), "a recipe is a list of `key: value` lines"))
    return document


def parse_value(text: str) -> Any:
    """A value given on the command line, read as YAML. Raises yaml.YAMLError."""
    document = Document()
    node = yaml.compose(text, Reader)
    value = None if node is None else _Walk(document, None).value(node, ())
    if document.findings:
        raise yaml.YAMLError(document.findings[0].message)
    return value


def _compose(text: str, document: Document, path: Path) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Reader)
        return node
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = f"not YAML: {error.problem or error.context}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"not YAML: the character {chr(error.character)!r} is not allowed"
    hint = "YAML is indented with spaces, and text with `: ` or `#` in it needs quotes"
    document.findings.append(Finding(Origin("file", path, line), (), problem, hint))
    return None


class _Walk:
    """Turns composed nodes into values and notes each key's line."""

    def __init__(self, document: Document, path: Path | None) -> None:
        self.document = document
        self.path = path
        self.reader = Reader("")
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, key: Key) -> Any:
        if any(node is parent for parent in self.open):
            return self.problem(node, key, "an alias that contains itself")
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
                return dict(self.pairs(node, key))
            if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
                return [self.element(child, (*key, index)) for index, child in enumerate(node.value)]
            return self.scalar(node, key)
        finally:
            self.open.pop()

    def pairs(self, node: yaml.MappingNode, key: Key) -> Iterator[tuple[str, Any]]:
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode):
                self.problem(name_node, key, "a key must be one word")
                continue
            if name_node.tag != "tag:yaml.org,2002:str":
                self.problem(name_node, (*key, name), "a key must be text", "put it in quotes")
                continue
            if name == "<<":
                self.problem(name_node, (*key, name), "YAML's merge key is not supported", "use `extends`")
                continue
            line = name_node.start_mark.line + 1
            if name in lines:
                self.problem(name_node, (*key, name), f"given twice, first on line {lines[name]}", "keep one of them")
                continue
            lines[name] = line
            self.note(name_node, (*key, name))
            yield name, self.value(value_node, (*key, name))

    def element(self, node: yaml.Node, key: Key) -> Any:
        self.note(node, key)
        return self.value(node, key)

    def scalar(self, node: yaml.Node, key: Key) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self.problem(node, key, f"the YAML tag {node.tag} is not supported", "write plain values")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "int" and not node.value.startswith("0x"):
            return int(node.value.replace("_", ""))
        if kind == "float":
            number = self.reader.construct_yaml_float(node)
            # 1e3 is a whole number to whoever writes it; 1.0 is not.
            whole = "." not in node.value and math.isfinite(number) and number.is_integer()
            return int(number) if whole else number
        if kind in ("int", "null", "bool", "str"):
            return self.reader.construct_object(node)
        return self.problem(node, key, f"the YAML tag {node.tag} is not supported", "write plain values")

    def note(self, node: yaml.Node, key: Key) -> None:
        self.document.origins[key] = self.origin(node)

    def problem(self, node: yaml.Node, key: Key, message: str, hint: str | None = None) -> None:
        self.document.findings.append(Finding(self.origin(node), key, message, hint))

    def origin(self, node: yaml.Node) -> Origin:
        return Origin("file", self.path, node.start_mark.line + 1) if self.path else Origin("command line")
