"""What `import offload` gives."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import offload

NAMES = [name for name in offload.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_docstring(name: str) -> None:
    """Every public name is there and says what it is for."""
    assert inspect.getdoc(getattr(offload, name))


def test_type_checkers_see_the_same_names() -> None:
    """The names imported for type checkers are those that exist at run time."""
    tree = ast.parse(Path(offload.__file__).read_text())
    declared = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert declared == set(NAMES)


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'FileSnik'"):
        _ = offload.FileSnik  # type: ignore[attr-defined]


def test_dir_lists_the_public_names() -> None:
    """Completion in a shell shows what there is."""
    assert set(NAMES) <= set(dir(offload))


def test_import_is_lazy() -> None:
    """Importing the package costs nothing that the program does not use."""
    code = "import sys, offload; print(*{'asyncio', 'aiofiles', 'typer', 'rich', 'asyncinotify'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_aiofiles_is_imported_by_open_only() -> None:
    """Writing packet files does not pay for aiofiles."""
    code = "import sys, offload; offload.PacketWriter, offload.Merge; print('aiofiles' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
