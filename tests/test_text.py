"""Text is read and written alike on every system: each call names its encoding."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_TEXT = {"Image", "os", "gzip", "tarfile", "webbrowser", "zipfile"}  # whose `open` is another
PLACE = {"read_text": 0, "write_text": 1, "open": 2}  # of the encoding among the arguments


def sources() -> Iterator[tuple[str, str]]:
    """Every Python file and every code cell of the checkout, with its name."""
    for folder in ("jahs_utils", "book", "tests", "tools", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                yield f"{path.name}, cell {number}", "".join(cell["source"])


def unnamed(source: str) -> list[int]:
    """Lines of calls that read or write text in whatever encoding the system has."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:
        return []  # a cell with a magic
    return [call.lineno for call in calls if is_unnamed(call)]


def is_unnamed(call: ast.Call) -> bool:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if "encoding" in given or None in given:
        return False
    if "True" in (given.get("text"), given.get("universal_newlines")):
        return True  # of a process
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if method else getattr(call.func, "id", "")
    if name not in PLACE or (not method and name != "open"):
        return False
    if name != "open":
        return len(call.args) <= PLACE[name]
    if method and ast.unparse(call.func.value) in NOT_TEXT:
        return False
    shift = 1 if method else 0  # a path's `open` begins with the mode
    mode = call.args[1 - shift] if len(call.args) > 1 - shift else None
    binary = "b" in given.get("mode", ast.unparse(mode) if mode else "'r'")
    return not binary and len(call.args) <= 3 - shift


def test_every_call_names_its_encoding():
    found = [f"{name}, line {line}" for name, text in sources() for line in unnamed(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("open(path)", True),
        ("open(path, 'a')", True),
        ("open(path, 'wb')", False),
        ("open(path, mode='rb')", False),
        ("path.open()", True),
        ("path.open('rb')", False),
        ("Image.open(path)", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, text=True, encoding='utf-8')", False),
    ],
)
def test_a_call_without_an_encoding_is_found(line, refused):
    assert unnamed(line) == [1] * refused
