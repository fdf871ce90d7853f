"""Numbers that cannot be are refused: one line, which fits a screen, whatever was given.

Each file of `tests/arguments` holds two tables: `jahs_utils.py` for the package, NN_name.py for the
exported functions of a chapter. `CASES` maps a function (a class stands for its constructor,
"Class.method" for a method) to the keyword arguments of a good call and, for each parameter with
numbers, values that are refused in its place. `EXEMPT` maps a function to the reason why not.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pydantic
import pytest

import jahs_utils
from jahs_utils import load_chapter

TABLES = {path.stem: path for path in sorted(Path(__file__).with_name("arguments").glob("*.py"))}


def modules(table: str) -> dict[str, object]:
    """The modules of a table, by the start of their functions' names."""
    if table != "jahs_utils":
        return {"": load_chapter(table)}
    names = [module.name for module in pkgutil.iter_modules(jahs_utils.__path__)]
    return {f"{name}.": importlib.import_module(f"jahs_utils.{name}") for name in names}


def parts(module: object) -> Iterator[tuple[str, Callable]]:
    """The public functions, classes and methods that a module defines."""
    units = [e.unit for e in getattr(module, "EXPERIMENTS", {}).values()]  # called with its grid
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not own or value in units:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            if not is_record(value):
                yield name, value
            for method in vars(value):
                function = getattr(value, method)
                if inspect.isroutine(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function


def is_record(kind: type) -> bool:
    """Whether a class only holds what it is given, or checks it with pydantic."""
    plain = dataclasses.is_dataclass(kind) and not hasattr(kind, "__post_init__")
    return plain or issubclass(kind, tuple | pydantic.BaseModel)


def numeric(function: Callable) -> set[str]:
    """The parameters with numbers, by their annotations."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of some built-in base class
        return set()
    # what a function takes is checked where it is called
    texts = {p.name: str(p.annotation).partition("Callable[")[0] for p in parameters}
    return {name for name, text in texts.items() if re.search(r"\b(int|float)\b", text)}


def found(table: str) -> dict[str, Callable]:
    named = {s + n: f for s, module in modules(table).items() for n, f in parts(module)}
    return {name: function for name, function in named.items() if numeric(function)}


def tables(table: str) -> dict:
    read = runpy.run_path(str(TABLES[table]))
    return {"CASES": read["CASES"], "EXEMPT": read.get("EXEMPT", {})}


@pytest.mark.parametrize("table", TABLES)
def test_every_public_function_with_numbers_is_in_the_table(table):
    known, functions = tables(table), found(table)
    assert sorted(functions) == sorted([*known["CASES"], *known["EXEMPT"]])
    for name, (_, bad) in known["CASES"].items():
        missing = numeric(functions[name]) - set(bad)
        assert not missing, f"{name}: no bad values of {missing}"


@pytest.mark.parametrize("table", TABLES)
def test_a_good_call_is_taken(table):
    functions = found(table)
    with plt.rc_context():
        for name, (good, _) in tables(table)["CASES"].items():
            functions[name](**good)
    plt.close("all")


@pytest.mark.parametrize("table", TABLES)
def test_what_cannot_be_is_refused_in_one_line_that_fits_a_screen(table):
    functions, wrong = found(table), []
    for name, (good, bad) in tables(table)["CASES"].items():
        for parameter, value in ((p, v) for p, values in bad.items() for v in values):
            call = f"{name}({parameter}={str(value)[:60]})"
            try:
                functions[name](**good | {parameter: value})
            except (ValueError, TypeError) as error:
                if "\n" in str(error) or not 0 < len(str(error)) <= 200:
                    wrong.append(f"{call}: {error!r}")
            except Exception as error:
                wrong.append(f"{call}: {error!r}")
            else:
                wrong.append(f"{call}: taken")
    assert not wrong, "\n".join(wrong)
