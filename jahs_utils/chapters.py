"""Chapters as importable code: the cells tagged `export`, and nothing else, make a module.

`load_chapter("00_training")` returns the module `jahs_utils.chapters.00_training`. It is a real
module: other processes can unpickle its functions, tracebacks show its lines, and
`inspect.getsource` works.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import pprint
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from jahs_utils import checks
from jahs_utils.checks import named_folder, one_of, shown

if TYPE_CHECKING:
    import nbformat

# A module with a path is a package to Python: chapters are its submodules, found by _Finder.
__path__: list[str] = []

ALLOWED = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)
REFUSALS = frozenset(checks.__all__)


def book_root() -> Path:
    """The folder that holds `chapters/`: `$JAHS_BOOK`, the working folder, or the checkout."""
    named = named_folder("JAHS_BOOK")
    places = [named] if named else [Path.cwd(), Path.cwd().parent, Path(__file__).parents[1]]
    for place in places:
        if (place / "chapters").is_dir():
            return place.resolve()
    raise ValueError(
        f"no folder chapters/ in {', '.join(map(str, places))}: "
        "run in the book's checkout or name it in JAHS_BOOK"
    )


def chapter_names() -> list[str]:
    """Names of all chapters, in order: `00_training`, ..."""
    return sorted(path.stem for path in (book_root() / "chapters").glob("[0-9]*_*.ipynb"))


def chapter_path(name: str) -> Path:
    """The notebook of a chapter; ValueError with the choices for an unknown name."""
    return book_root() / "chapters" / f"{one_of(name, chapter_names(), 'chapter')}.ipynb"


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook of format 4, also one that a byte-order mark starts or whose cells have no ids."""
    import nbformat  # seconds, and a machine that only computes rows may lack it
    from nbformat.warnings import MissingIDFieldWarning

    with warnings.catch_warnings(action="ignore", category=MissingIDFieldWarning):
        try:
            return nbformat.reads(path.read_text("utf-8-sig"), as_version=4)
        except OSError:
            raise
        except Exception as error:  # of many kinds, for text and for JSON that is no notebook
            raise ValueError(f"{path} is not a notebook ({shown(str(error))})") from None


def _code_cells(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Number, source and tags of each code cell, read without nbformat."""
    try:
        cells = json.loads(path.read_text("utf-8-sig"))["cells"]
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                yield number, "".join(cell["source"]), cell["metadata"].get("tags", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a notebook ({shown(problem)})") from None


def exported_source(path: Path) -> str:
    """The source of a notebook's cells tagged `export`, each under a line that names its cell.

    Raises ValueError when such a cell holds more than imports, constants, functions and classes.
    """
    parts = []
    for number, source, tags in _code_cells(path):
        if "export" not in tags:
            continue
        try:
            statements = ast.parse(source).body
        except SyntaxError as error:
            raise ValueError(
                f"{path.name}, cell {number}, line {error.lineno}: an export cell holds plain "
                f"Python ({error.msg})"
            ) from None
        for node in statements:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not isinstance(node, ALLOWED) and not docstring:
                raise ValueError(
                    f"{path.name}, cell {number}, line {node.lineno}: an export cell holds only "
                    "imports, constants, functions and classes"
                )
        parts.append(f"# %% {path.name}, cell {number}\n{source}\n")
    return "\n".join(parts)


def code_version(function: Callable[..., object]) -> str:
    """Twelve hex digits that change with what `function`, or anything it uses, does.

    What it uses: functions, classes and constants of the same module, followed to the end.
    Comments, layout, docstrings, annotations of functions, and statements that can do nothing but
    refuse an argument do not count: none of them changes what an accepted call gives.
    """
    module = inspect.getmodule(function)
    parts, waiting, seen = [], [function.__name__], set()
    while waiting:
        name = waiting.pop()
        value = inspect.unwrap(getattr(module, name, None))  # the function under a cache
        if name in seen or value is None:
            continue
        seen.add(name)
        if inspect.isfunction(value) or inspect.isclass(value):
            if value.__module__ == module.__name__:
                source = inspect.getsource(value)
                tree = _behaviour(source)
                parts.append(ast.unparse(tree))
                names = (n for n in ast.walk(tree) if isinstance(n, ast.Name))
                waiting += sorted({node.id for node in names})
        elif not inspect.ismodule(value):
            parts.append(f"{name} = {_lasting(value)}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]


def _behaviour(source: str) -> ast.Module:
    """The syntax tree of `source` without docstrings, annotations and refusals of functions."""
    tree = _WithoutRefusals().visit(ast.parse(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        documented = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


class _WithoutRefusals(ast.NodeTransformer):
    """Drops bare calls of `jahs_utils.checks` and conditions that only refuse a value or a type.

    Other errors steer what a caller does next.
    """

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        return None if isinstance(called, ast.Name) and called.id in REFUSALS else node

    def visit_If(self, node: ast.If) -> ast.stmt | None:
        raised = node.body[0].exc if isinstance(node.body[0], ast.Raise) else None
        kind = raised.func if isinstance(raised, ast.Call) else raised
        refuses = isinstance(kind, ast.Name) and kind.id in ("TypeError", "ValueError")
        if refuses and not node.orelse:
            return None
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node


def _lasting(value: object) -> str:
    """A constant as text that is the same in every process: sets sorted, addresses left out."""
    text = pprint.pformat(value, width=1, sort_dicts=False)  # sorts sets only when it breaks lines
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def load_chapter(name: str) -> ModuleType:
    """The module made of a chapter's exported cells; the same module in every call.

    Raises ValueError for an unknown chapter or an export cell with other statements.
    """
    chapter_path(name)
    return importlib.import_module(f"{__name__}.{name}")


class _Loader(importlib.abc.SourceLoader):
    def __init__(self, name: str) -> None:
        self.path = chapter_path(name)
        # Read once: tracebacks and code_version must show what runs, also after an edit.
        self.source = exported_source(self.path)

    def get_data(self, path: str) -> bytes:
        return self.source.encode()

    def get_filename(self, fullname: str) -> str:
        # No such file exists, so Python asks this loader for the lines of a traceback.
        return f"{self.path}[export]"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__ or name not in chapter_names():
            return None
        return importlib.util.spec_from_loader(fullname, _Loader(name))


sys.meta_path.append(_Finder())
