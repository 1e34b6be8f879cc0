"""Edits of the universe file's text that leave everything else in it as a person wrote it: comments, order, layout.

Places come from PyYAML's marks. Nothing is checked here: an edit of a layout that is not understood gives text that means
something else, or nothing, and `file.py` compares what it means before anything is written.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import yaml


def cut_items(text: str, indexes: Iterable[int]) -> str:
    """``text`` without these items of its list ``series``, with the comments on their own lines; those between items stay."""
    items = _find_items(text)
    for index in sorted(indexes, reverse=True):
        start = text.rfind("\n", 0, items[index].start_mark.index) + 1
        end = text.find("\n", max(_ends_of(items[index])))
        text = text[:start] + (text[end + 1 :] if end >= 0 else "")
    return text


def set_timeframes(text: str, wanted: Mapping[int, Sequence[str]]) -> str:
    """``text`` with other timeframes in these items."""
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
    """``text`` with ``block``, items of a list at the margin, after the last item and as far in as those."""
    items = _find_items(text)
    column = max(items[-1].start_mark.column - len("- "), 0) if items else 0
    return text.rstrip("\n") + "\n" + textwrap.indent(block, " " * column)


def comments_of(text: str) -> list[str]:
    """Everything that may be a comment, in order."""
    return [line.split("#", 1)[1] for line in text.splitlines() if "#" in line]


def _find_items(text: str) -> list[yaml.Node]:
    try:
        root = yaml.compose(text)
    except yaml.YAMLError:  # an earlier edit did not understand the layout
        return []
    for key, value in _pairs(root):
        if key.value == "series" and isinstance(value, yaml.SequenceNode):
            return list(value.value)
    return []


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def _ends_of(node: yaml.Node) -> list[int]:
    """Where the node's own text ends; the end mark of a block lies beyond the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        children = [n for pair in _pairs(node) for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        return [end for child in children for end in _ends_of(child)] or [node.end_mark.index]
    return [node.end_mark.index]
