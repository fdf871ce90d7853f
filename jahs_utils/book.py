"""Chapters run by papermill, checked by nbval, and built into a site by jupyter-book.

Notebooks run on this Python, whatever kernel they name, and need no home folder: what Jupyter,
IPython and Matplotlib keep goes into the cache folder.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError

from jahs_utils.chapters import book_root, chapter_names, chapter_path, read_notebook
from jahs_utils.checks import PROFILES, named_folder, number, one_of, shown, writable_folder
from jahs_utils.device import cache_folder

PRIVATE_FOLDERS = {
    "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "jupyter-config",
    "JUPYTER_RUNTIME_DIR": "jupyter-runtime",
    "MPLCONFIGDIR": "matplotlib",
}
MATHJAX_PARTS = (
    "LICENSE",
    "MathJax.js",
    "config/TeX-AMS-MML_HTMLorMML-full.js",
    "extensions/*.js",
    "extensions/HTML-CSS/*.js",
    "extensions/TeX/**/*.js",
    "jax/element/**/*.js",
    "jax/input/TeX/*.js",
    "jax/output/HTML-CSS/**/*.js",
    "fonts/HTML-CSS/STIX-Web/woff/*",
)
FOLDED = frozenset({"hide-input", "hide-cell", "remove-input"})
PROMPTS = ("code_prompt_show", "code_prompt_hide")
DRAWINGS = "regex: <svg[\\s\\S]*?</svg>\nreplace: drawing\n"  # versions of a library differ
Say = Callable[..., object]


class BookError(RuntimeError):
    """A chapter or the build failed; the message says where, and what is left to look at."""


def private_environment() -> dict[str, str]:
    """The environment for notebooks and tools: folders of their own in the cache, no progress bar.

    Folders that are named in the environment already are kept. Raises ValueError without a cache.
    """
    cache = cache_folder()
    user = getattr(os, "getuid", int)()  # several may share the cache, Jupyter's files they cannot
    home = writable_folder(cache / f"notebooks-{user}")
    folders = {name: str(home / folder) for name, folder in PRIVATE_FOLDERS.items()}
    fixed = {
        "JAHS_BOOK": str(book_root()),  # absolute: a notebook runs in another folder
        "JAHS_CACHE": str(cache),
        "JAHS_PROGRESS": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a debugger's warning would stand among our lines
        "PYTHONUTF8": "1",  # not all tools name the encoding of what they read
    }
    named_folder("JAHS_DATA")  # makes it absolute, too
    return folders | os.environ | fixed


class _ThisPython(AsyncKernelManager):
    """Starts a kernel of the running Python, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = ["--log-level=50"]  # it warns of loopback without encryption, and more
        environment = {k: v.replace("$", "$$") for k, v in private_environment().items()}
        return KernelSpec(**get_kernel_dict(quiet), env=environment)  # Jupyter substitutes $NAME


# --- running chapters -----------------------------------------------------------------------------


def chapter_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `parameters` that differ from what the chapter's parameter cell assigns.

    Raises ValueError for a name that this cell does not assign, with the choices, and for a value
    of another type than the default: None and expressions take anything, floats whole numbers.
    """
    known, changed = _defaults(name), {}
    for parameter, value in parameters.items():
        default = known[one_of(parameter, known, f"parameter of {name}")]
        if type(default) is float and type(value) in (int, float):
            value = float(number(value, f"{parameter} of {name}"))
        if type(value) is not type(default) and not isinstance(default, ast.AST | None):
            example = f"'{parameter}=\"{value}\"'" if type(default) is str else repr(default)
            raise ValueError(
                f"{parameter} of {name} is of type {type(default).__name__}, got {shown(value)} of "
                f"type {type(value).__name__}: write as Python does, for example {example[:60]}"
            )
        if value != default:
            changed[parameter] = value
    if "profile" in parameters:
        one_of(parameters["profile"], PROFILES, "profile")
    return changed


def _defaults(name: str) -> dict[str, Any]:
    """What the parameter cell of a chapter assigns; what is no literal stays an expression."""
    cells = read_notebook(chapter_path(name)).cells
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", [])), "")
    defaults: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                value = node.value
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defaults |= {t.id: value for t in targets if isinstance(t, ast.Name)}
    return defaults


def run_chapter(
    name: str,
    out: Path,
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    log: Say = lambda line: None,
) -> float:
    """Run a chapter from top to bottom, write the executed notebook to `out`, return the seconds.

    parameters: other values for the chapter's parameter cell. log: gets a line as each code cell
    starts. Raises ValueError for unknown names, BookError when a cell fails; the notebook up to
    that cell is kept in `out`.
    """
    changed = chapter_parameters(name, {"profile": profile} | dict(parameters or {}))
    out = Path(out).expanduser().absolute()
    if out.suffix != ".ipynb" or out.resolve() == chapter_path(name):
        raise ValueError(f"out must be the path of another notebook, NAME.ipynb, got {out}")
    private_environment()  # makes folders absolute before the working folder changes
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(_with_parameters(name, changed), out)
    place = str(out).replace("{", "{{").replace("}", "}}")  # papermill formats paths
    start = time.perf_counter()

    def report(cell: nbformat.NotebookNode, cell_index: int) -> None:
        log(f"{name}, cell {cell_index}, after {time.perf_counter() - start:.0f} s")

    try:
        papermill.execute_notebook(
            place,
            place,
            kernel_name="python3",  # only a name: the kernel manager decides
            kernel_manager_class=_ThisPython,
            cwd=chapter_path(name).parent,
            progress_bar=False,
            coalesce_streams=True,
            on_cell_execute=report,
        )
    except papermill.PapermillExecutionError as error:
        where = f"{name}, cell [{error.exec_count}]: {error.ename}"
        reason = "".join(f": {line}" for line in error.evalue.strip().splitlines()[-1:])
        raise BookError(f"{where}{reason} (executed up to there: {_short(out)})") from None
    except DeadKernelError:
        raise BookError(
            f"{name}: its Python process died, often for lack of memory "
            f"(executed up to there: {_short(out)})"
        ) from None
    return time.perf_counter() - start


def _with_parameters(name: str, values: Mapping[str, Any]) -> nbformat.NotebookNode:
    """A chapter's notebook with a cell that assigns `values`, behind its parameter cell."""
    notebook = nbformat.v4.upgrade(read_notebook(chapter_path(name)))
    if values:
        source = "\n".join(["# Parameters", *(f"{k} = {v!r}" for k, v in values.items())])
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        place = 1 + next(k for k, names in enumerate(tags) if "parameters" in names)
        added = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(place, added)
    return notebook


def refresh_chapter(name: str) -> float:
    """Run a chapter as it is stored and put the new outputs into its notebook; return the seconds.

    Nothing else changes but the metadata that folds cells, so the difference shows what came out
    differently.
    """
    path = chapter_path(name)
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / path.name
        seconds = run_chapter(name, executed)
        fresh = read_notebook(executed)
    stored = read_notebook(path)
    for cell, ran in zip(stored.cells, fresh.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    fold(stored)
    draft = path.with_suffix(".ipynb.draft")
    nbformat.write(stored, draft)
    os.replace(draft, path)
    return seconds


def fold(notebook: nbformat.NotebookNode) -> None:
    """Fold the code of cells that are tagged so: on the site, in JupyterLab and in Colab.

    The prompt is the cell's first line, a comment that says what is in there: "# Draws: the error".
    Cells without such a tag are unfolded.
    """
    for cell in notebook.cells:
        line = cell.source.partition("\n")[0].removeprefix("# ")
        prompts = dict.fromkeys(PROMPTS, f"Code: {line[:1].lower()}{line[1:]}")
        folded = not FOLDED.isdisjoint(cell.metadata.get("tags", []))
        for key, values in {"mystnb": prompts, "jupyter": {"source_hidden": True}}.items():
            other = {k: v for k, v in cell.metadata.pop(key, {}).items() if k not in values}
            cell.metadata |= {key: other | values} if folded else {key: other} if other else {}
        cell.metadata.pop("cellView", None)
        cell.metadata |= {"cellView": "form"} if folded else {}


def visible_lines(notebook: nbformat.NotebookNode) -> int:
    """Lines of code that a reader of the page sees."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [c for c in code if not {*FOLDED, "remove-cell"} & {*c.metadata.get("tags", [])}]
    return sum(len(cell.source.splitlines()) for cell in shown)


def check_chapters(chapters: Iterable[str | Path] | None = None) -> int:
    """Run chapters and compare with their stored outputs; the exit status of nbval (0: all equal).

    chapters: names or paths of notebooks (default: every chapter). Every cell must give what is
    stored, to the letter, except those tagged `nbval-ignore-output` and the drawing of a figure.
    """
    names = chapter_names() if chapters is None else list(chapters)
    paths = [n if str(n).endswith(".ipynb") else chapter_path(str(n)) for n in names]
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q"]
    command += ["-p", "no:cacheprovider", "--nbval-sanitize-with", "sanitize.cfg"]
    with tempfile.TemporaryDirectory() as folder:  # pytest refuses some paths, nbval some notebooks
        Path(folder, "sanitize.cfg").write_text(DRAWINGS, encoding="utf-8")
        for path in map(Path, paths):
            notebook = read_notebook(path)
            nbformat.write(notebook, Path(folder, path.name))
            print(f"{path.stem}: {visible_lines(notebook)} visible lines", flush=True)
            command.append(path.name)
        with _cores_shared(len(paths)) as at_once:
            if at_once > 1:
                command += ["--numprocesses", str(at_once), "--dist", "loadfile"]
            done = subprocess.run(command, env=private_environment(), cwd=folder, check=False)
        return done.returncode


# --- building the site ----------------------------------------------------------------------------


def build(
    *,
    strict: bool = False,
    parameters: Mapping[str, Any] | None = None,
    run: bool = True,
    folder: Path | None = None,
    say: Say = print,
) -> Path:
    """Run every chapter in the quick profile, build the HTML, return the path of `index.html`.

    strict: a warning is an error. parameters: other values for the chapters' parameter cells.
    run: False shows the outputs that are stored in the notebooks. folder: where to build (default:
    `_build` in the checkout). say: takes text and `end`, as `print` does. Raises ValueError for an
    unknown parameter and BookError when a chapter or jupyter-book fails.
    """
    root = book_root()
    folder = (folder or root / "_build").absolute()
    source = folder / "source"
    for name in chapter_names():
        chapter_parameters(name, parameters or {})  # before the first chapter takes its time
    shutil.rmtree(source, ignore_errors=True)
    stage_pages(root, source)
    if run:
        _run_side_by_side(source / "chapters", parameters, say)
    for name in chapter_names():
        target = source / "chapters" / f"{name}.ipynb"
        page = read_notebook(target if run else chapter_path(name))
        fold(page)
        nbformat.write(page, target)
    stage_vega(source)
    say("the book ... ", end="")
    start = time.perf_counter()
    built = _jupyter_book(source, folder / "jupyter-book.log", strict, say)
    html = folder / "html"
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(built, html)
    say(f"{time.perf_counter() - start:.0f} s")
    say(f"\nThe book is in {_short(html)}. Open {_short(html / 'index.html')} in a browser, or run")
    say(f"  python -m http.server -d {shlex.quote(_short(html))}\nand go to http://localhost:8000")
    return html / "index.html"


def _run_side_by_side(folder: Path, parameters: Mapping[str, Any] | None, say: Say) -> None:
    """Run all chapters into `folder`, as many at a time as there are cores."""

    def run(name: str) -> tuple[str, float]:
        return name, run_chapter(name, folder / f"{name}.ipynb", parameters=parameters)

    with _cores_shared(len(chapter_names())) as at_once, ThreadPoolExecutor(at_once) as pool:
        try:
            for done in as_completed([pool.submit(run, name) for name in chapter_names()]):
                say("chapters/{}: {:.0f} s".format(*done.result()))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, what has not begun


@contextmanager
def _cores_shared(chapters: int) -> Iterator[int]:
    """How many of so many chapters run at a time; their kernels take no more threads than cores."""
    cores = joblib.cpu_count()
    at_once = max(1, min(cores, chapters))
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = given or str(cores // at_once)
    try:
        yield at_once
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


def stage_pages(root: Path, source: Path) -> None:
    """Put everything but the chapters where jupyter-book reads it: pages, tables, MathJax."""
    shutil.copytree(root / "book", source / "book")
    (source / "chapters").mkdir()
    for name in ("_config.yml", "_toc.yml"):
        shutil.copyfile(root / name, source / name)
    runpy.run_path(str(source / "book" / "pages.py"))["fill_in"](source / "book")
    _copy_mathjax(source / "book" / "_static" / "mathjax")


def _copy_mathjax(target: Path) -> None:
    """The parts of MathJax that this book uses, so that no page asks another host for them."""
    import jupyter_server_mathjax

    source = Path(jupyter_server_mathjax.__file__).parent / "static"
    for part in MATHJAX_PARTS:
        for file in source.glob(part):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def stage_vega(source: Path) -> None:
    """Vega, if a page has an interactive figure: it takes seconds to bundle and to import."""
    pages = [page.read_text(encoding="utf-8") for page in source.rglob("*.ipynb")]
    if any("jahs-interactive" in page for page in pages):
        import vl_convert

        script = source / "book" / "_static" / "vega.js"
        bundle = f"(() => {{\n{vl_convert.javascript_bundle()}\n}})();\n"  # its names are its own
        script.write_text(bundle, encoding="utf-8")


def _jupyter_book(source: Path, log: Path, strict: bool, say: Say) -> Path:
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    options = [*(["-W", "-n", "--keep-going"] if strict else []), str(source)]
    with open(log, "w", encoding="utf-8") as file:
        out = {"stdout": file, "stderr": subprocess.STDOUT}
        done = subprocess.run(command + options, **out, env=private_environment(), check=False)
    if done.returncode:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text("utf-8", "replace")).splitlines()
        named = [line for line in lines if "WARNING" in line or "ERROR" in line]
        say("failed\n" + "\n".join(named or lines[-20:]))
        raise BookError(
            f"jupyter-book failed, status {done.returncode}: all of its log is in {_short(log)}"
        )
    return source / "_build" / "html"


def _short(path: Path) -> str:
    """A path as one types it: relative to the working folder where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
