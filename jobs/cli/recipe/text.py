"""From the text of a recipe to its modifiers, each with the line it stands in.

Three forms are read: stages (`x_stage: {run_type, y_modifiers: {Name: {...}}}`), groups at the top
(`y_modifiers: [!Name {...}]`, tags or plain), and either as the front matter of Markdown or as
JSON. Nothing in it is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sparsify.errors import InputError

OWN = "twofour"
"""key at the top with options of ours; llm-compressor passes over it"""

_TYPES = ("oneshot", "train", None)


class Table(dict[str, Any]):
    """A mapping that knows its keys' lines."""

    lines: dict[str, int]


@dataclass(frozen=True)
class Modifier:
    """One modifier."""

    name: str
    args: Table
    line: int
    stage: str
    """that it is in; '' at the top"""
    run_type: str | None
    """oneshot or train, where the stage says so"""


@dataclass(frozen=True)
class RecipeText:
    """What a recipe says."""

    modifiers: list[Modifier]
    own: Table
    """options of ours"""
    unused: list[tuple[str, int]]
    """keys that say nothing of a modifier, with their lines"""


class _Loader(yaml.SafeLoader):
    """Plain values alone; a tag becomes {its name: what it tags}."""

    def construct_table(self, node: yaml.MappingNode) -> Iterator[Table]:
        """Remember lines; refuse a key that is there twice, of which YAML takes the last."""
        table = Table()
        table.lines = {}
        yield table
        for key_node, value_node in node.value:
            key, line = str(self.construct_object(key_node)), key_node.start_mark.line + 1
            if key in table:
                raise InputError(f"line {line}: {key} is there twice; leave one")
            table[key] = self.construct_object(value_node, deep=True)
            table.lines[key] = line

    def construct_tagged(self, suffix: str, node: yaml.Node) -> Iterator[Table]:
        """`!Name {...}` as {Name: {...}}."""
        table = Table()
        table.lines = {suffix: node.start_mark.line + 1}
        yield table
        if isinstance(node, yaml.MappingNode):
            (table[suffix],) = self.construct_table(node)  # a generator: complete after its end
        elif isinstance(node, yaml.ScalarNode) and not node.value:
            table[suffix] = _empty()
        else:
            raise InputError(f"line {node.start_mark.line + 1}: !{suffix} is no mapping")


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_table)
_Loader.add_multi_constructor("!", _Loader.construct_tagged)


def _empty() -> Table:
    table = Table()
    table.lines = {}
    return table


def parse(text: str) -> RecipeText:
    """The modifiers of a recipe, in their order.

    Raises:
        InputError: no YAML, no recipe, a placeholder to be evaluated, or a stage of a kind that is
            not known; starts with the line.
    """
    try:
        whole = yaml.load(_front_matter(text), Loader=_Loader)  # noqa: S506 - it is a safe one
    except yaml.YAMLError as error:
        raise InputError(" ".join(str(error).split())) from None
    if not isinstance(whole, Table):
        raise InputError("is no recipe: a mapping with stages or groups of modifiers is expected")
    _refuse_placeholders(whole)
    found = RecipeText([], _empty(), [])
    for key, value in whole.items():
        line = whole.lines[key]
        if key == OWN:
            found = RecipeText(found.modifiers, _table(value, key, line), found.unused)
        elif key.endswith("_stage"):
            _add_stage(found, key, _table(value, key, line))
        elif key.endswith("_modifiers") or key == "modifiers":
            _add_group(found, value, line, "", None)
        else:
            found.unused.append((key, line))
    if not found.modifiers and not found.own:
        raise InputError("has no modifiers in it")
    return found


def _add_stage(found: RecipeText, name: str, stage: Table) -> None:
    run_type = stage.get("run_type")
    if run_type not in _TYPES:
        raise InputError(
            f"line {stage.lines['run_type']}: run_type {run_type!r} of {name} is neither oneshot "
            "nor train"
        )
    for key, value in stage.items():
        line = stage.lines[key]
        if key.endswith("_modifiers") or key == "modifiers":
            _add_group(found, value, line, name, run_type)
        elif key != "run_type":
            found.unused.append((f"{name}.{key}", line))


def _add_group(found: RecipeText, group: Any, line: int, stage: str, run_type: str | None) -> None:
    """A mapping of names, or a list of mappings with one each."""
    for table in group if isinstance(group, list) else [group]:
        for name, args in _table(table, "a group of modifiers", line).items():
            own = table.lines[name]
            found.modifiers.append(Modifier(name, _table(args, name, own), own, stage, run_type))


def _table(value: Any, what: str, line: int) -> Table:
    if value is None:
        return _empty()
    if not isinstance(value, Table):
        raise InputError(f"line {line}: {what} is {value!r}, not a mapping")
    return value


def _refuse_placeholders(value: Any, line: int = 0, key: str = "") -> None:
    """Expressions to be evaluated, and Jinja."""
    if isinstance(value, Table):
        for name, inner in value.items():
            _refuse_placeholders(inner, value.lines[name], name)
    elif isinstance(value, list):
        for inner in value:
            _refuse_placeholders(inner, line, key)
    elif isinstance(value, str) and (value.lstrip().startswith("eval(") or "{{" in value):
        raise InputError(
            f"line {line}: {key} is {value!r}, which is to be evaluated, and nothing in a recipe "
            "is; write the number"
        )


def _front_matter(text: str) -> str:
    """The YAML at the head of Markdown, with its lines where they were; other text as it is."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return text
    ends = [place for place, line in enumerate(lines[1:], 1) if line.strip() == "---"]
    return "\n".join(["", *lines[1 : ends[0]]]) if ends else text


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
