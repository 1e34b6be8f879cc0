"""The shape of the package: what a newcomer may rely on when reading the folder listing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ktrdr_pipelines

PACKAGE = Path(ktrdr_pipelines.__file__).parent
MODULES = [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]
TOP_LEVEL_AT_MOST = 9


def test_few_modules_lie_loose_at_top_level() -> None:
    """Everything else is in the package that its name leads to."""
    loose = [path.name for path in MODULES if path.parent == PACKAGE]
    assert "definitions.py" in loose
    assert len(loose) <= TOP_LEVEL_AT_MOST


def test_no_two_modules_have_one_name() -> None:
    """A name in a docstring or a traceback means one module."""
    names = Counter(path.stem for path in MODULES if not path.stem.startswith("__"))
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []


def test_tests_mirror_the_package() -> None:
    """A folder of tests is a package of the program, or says why it is not."""
    tests = Path(__file__).parent
    others = {"clients", "deploy", "scenarios"}
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")} - {Path()}
    assert len(folders) > 10
    assert [f for f in folders if not (PACKAGE / f).is_dir() and f.parts[0] not in others] == []
