"""Edits of the universe file's text that keep everything else as the user wrote it: comments, order, layout.

Positions come from PyYAML's marks. Nothing is validated here: an unusual layout may lead to a wrong edit, so `file.py` parses
the edited text and compares the result before it writes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import yaml


def cut_items(text: str, indexes: Iterable[int]) -> str:
    """``text`` without these items of its list ``series``. Comments inside an item go with it, those between items stay."""
    items = _find_items(text)
    for index in sorted(indexes, reverse=True):
        start = text.rfind("\n", 0, items[index].start_mark.index) + 1
        end = text.find("\n", max(_ends_of(items[index])))
        text = text[:start] + (text[end + 1 :] if end >= 0 else "")
    return text


def set_timeframes(text: str, wanted: Mapping[int, Sequence[str]]) -> str:
    """``text`` with the timeframes of ``wanted`` in the items at these indexes."""
    items = _find_items(text)
    for index in sorted(wanted, reverse=True):
        node = next((v for k, v in _pairs(items[index]) if k.value == "timeframes"), None)
        if not isinstance(node, yaml.SequenceNode):
            continue
        start, end = node.start_mark, max(_ends_of(node))
        between = ", " if node.flow_style else f"\n{' ' * start.column}- "
        body = between.join(wanted[index])
        text = text[: start.index] + (f"[{body}]" if node.flow_style else f"- {body}") + text[end:]
    return text


def append_items(text: str, block: str) -> str:
    """``text`` with ``block``, list items at the margin, after the last item and with its indentation."""
    items = _find_items(text)
    column = max(items[-1].start_mark.column - len("- "), 0) if items else 0
    return text.rstrip("\n") + "\n" + textwrap.indent(block, " " * column)


def comments_of(text: str) -> list[str]:
    """Everything after a ``#``, in order."""
    return [line.split("#", 1)[1] for line in text.splitlines() if "#" in line]


def _find_items(text: str) -> list[yaml.Node]:
    try:
        root = yaml.compose(text)
    except yaml.YAMLError:  # an earlier edit broke the text
        return []
    for key, value in _pairs(root):
        if key.value == "series" and isinstance(value, yaml.SequenceNode):
            return list(value.value)
    return []


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def _ends_of(node: yaml.Node) -> list[int]:
    """Where the node's own text ends; the end mark of a block is after the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        children = [n for pair in _pairs(node) for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        return [end for child in children for end in _ends_of(child)] or [node.end_mark.index]
    return [node.end_mark.index]
