"""The built site, opened in headless Chromium: every request is recorded and every page measured.

`JAHS_SITE` names a site that is built already; otherwise the book's pages are built with a short
chapter in place of each real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import http.server
import json
import os
import runpy
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from jahs_utils.book import build
from jahs_utils.chapters import chapter_names, load_chapter

ROOT = Path(__file__).parents[1]
headings = runpy.run_path(str(ROOT / "book" / "pages.py"))["headings"]
CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
WIDTHS = (1280, 390)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-port=0",
]
STAND_IN = r"""# A chapter

The *effective rank* of $H$ with singular values $\sigma_i$ is

$$
\operatorname{erank}(H) = \exp\Bigl(-\sum_{i=1}^n p_i \log p_i\Bigr), \qquad
p_i = \frac{\sigma_i}{\sum_{j=1}^n \sigma_j} \in \mathbb{R}
$$ (erank)

and {eq}`erank` lies between 1 and $n$:

\begin{align}
\mathcal{L}(\mathbf{w}) &= \mathbb{E}_{q(\boldsymbol{\phi})}[\ell(\mathbf{w})] \\
1 &\le \operatorname{erank}(H) \le n
\end{align}
"""
DRAWING = """# Draws: runs by group
from jahs_utils.plots import COLORS, diagram, dots_by_group, new_figure, show

fig, axes = new_figure(1, 2)
dots_by_group(axes[0, 0], {"default": [8, 9, 7], "random": [7, 6, 8], "joint": [5, 6, 5]})
axes[0, 0].set_xlabel("error in %")
axes[0, 1].imshow([[0, 1], [1, 0]])"""
DIAGRAM = """# Draws: the loop
fig, axes = new_figure(size=(5.4, 2.4))
boxes = {"ask": (0, 0, "sample", COLORS[0]), "fit": (4, 0, "train for\\nr epochs", "black")}
diagram(axes[0, 0], boxes, [("ask", "fit", "27"), ("fit", "ask", "η r", 0.5)])
show(fig, "A loop", "Two boxes with two arrows")"""
SENTENCE = (
    "The rank {eq}`erank-NAME` lies between $1$ and $n = 7$, as {cite:t}`elsken2017nash` find; "
    "a sentence that is computed looks like **one** that is written."
)
INTERACTIVE_CHAPTER = "00_training"  # the others have none, so they have to do without the scripts
INTERACTIVE = """# Draws, in the browser: a number doubled
import altair as alt
import pandas as pd
from jahs_utils.interactive import interactive

slider = alt.binding_range(min=1, max=9, step=1, name="a number")
chart = alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(x="x:Q").add_params(
    alt.param("n", bind=slider, value=1), alt.param("says", expr="'twice it is ' + 2 * n")
)
interactive(chart, "A number", "A point", "twice it is 2", pd.DataFrame({"x": [1]}), 1)"""
MEASURE = """
(async () => {
  const maths = [...document.querySelectorAll('.math.notranslate')];
  const typeset = () => new Promise(done => {
    const look = () => window.MathJax?.Hub?.Register
      ? MathJax.Hub.Register.StartupHook('End', () => done()) : setTimeout(look, 50);
    look();
  });
  const late = new Promise(done => setTimeout(done, 15000));
  if (maths.length) await Promise.race([typeset(), late]);
  const visible = node => {
    const copy = node.cloneNode(true);
    copy.querySelectorAll('script').forEach(script => script.remove());
    return copy.textContent;
  };
  const article = document.querySelector('.bd-article');
  const edge = article ? article.getBoundingClientRect().right + 1 : Infinity;
  const parts = article ? [...article.querySelectorAll('table, img, pre, .math.notranslate')] : [];
  const charts = [...document.querySelectorAll('.jahs-interactive')];
  const drawn = () => charts.every(chart => chart.querySelector('.vega-bindings'));
  for (let k = 0; k < 300 && !drawn(); k++) await new Promise(done => setTimeout(done, 50));
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => numbers(color).slice(0, 3)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = node => {
    const color = getComputedStyle(node).backgroundColor;
    return numbers(color)[3] === 0 && node.parentElement ? behind(node.parentElement) : color;
  };
  const figures = article ? [...article.querySelectorAll('.jahs-figure')] : [];
  const look = (figure, theme) => {
    document.documentElement.dataset.theme = theme;
    const svg = figure.querySelector('svg'), ground = behind(svg);
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll('text')].filter(t => !t.children.length);
    const contrasts = [figure.querySelector('figcaption'), ...texts].map(t => {
      const style = getComputedStyle(t), ink = t.matches('text') ? style.fill : style.color;
      const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    });
    return {
      theme, ground: light(ground), contrast: Math.min(...contrasts),
      alt: svg.closest('[aria-label]')?.ariaLabel,
      heights: scale ? texts.map(t => parseFloat(getComputedStyle(t).fontSize) * scale) : [],
      fonts: texts.map(t => getComputedStyle(t).fontFamily),
      font: getComputedStyle(article).fontFamily,
    };
  };
  const looks = ['dark', 'light'].flatMap(theme => figures.map(f => look(f, theme)));
  const ids = [...document.querySelectorAll('.jahs-figure [id]')].map(node => node.id);
  return JSON.stringify({
    charts: charts.length,
    drawn: drawn(),
    looks,
    ids_twice: ids.filter((id, k) => ids.indexOf(id) !== k),
    folded: [...document.querySelectorAll('details.hide')].map(d => ({
      prompt: d.querySelector('.collapsed').textContent, open: d.open,
    })),
    said: [...document.querySelectorAll('.tag_remove-input p:not(li p)')].map(p => {
      const other = article.querySelector('section > p'), [a, b] = [p, other].map(n => ({
        left: n.getBoundingClientRect().left, ground: behind(n),
        size: getComputedStyle(n).fontSize, color: getComputedStyle(n).color,
      }));
      return {text: visible(p), same: JSON.stringify(a) === JSON.stringify(b)};
    }),
    width: innerWidth,
    scroll_width: document.documentElement.scrollWidth,
    equations: maths.length,
    untypeset: maths.filter(m => !m.querySelector('.MathJax') || /\\\\[a-zA-Z([]/.test(visible(m)))
      .map(m => m.textContent.slice(0, 80)),
    errors: [...document.querySelectorAll('.MathJax_Error, .merror, .noError')].map(visible),
    too_wide: parts.filter(p => p.getBoundingClientRect().right > edge)
      .map(p => p.outerHTML.slice(0, 80)),
    alts: article ? [...article.querySelectorAll('img')].map(i => i.getAttribute('alt')) : [],
    title: document.title,
  });
})()
"""


@dataclasses.dataclass
class Visit:
    """What a browser saw on one page at one width."""

    page: str
    seen: dict[str, Any]
    requests: list[str]
    failed: list[str]
    errors: list[str]

    def __str__(self) -> str:
        return f"{self.page} at {self.seen['width']} px"


def stand_in_chapter(name: str) -> nbformat.NotebookNode:
    """A notebook with all that a chapter has: equations, figures, folded code, a wide table."""
    text = STAND_IN.replace("(erank)", f"(erank-{name})").replace("`erank`", f"`erank-{name}`")
    # the scoreboard links to the headings of the real chapters
    sections = "\n\n".join(f"## {heading}" for heading in headings(name)[1:])
    figure = (
        "import matplotlib.pyplot as plt\n\n"
        "fig, ax = plt.subplots(figsize=(10, 3))\nax.plot([0, 1], [0, 1])\nplt.show()"
    )
    drawn = f"{DRAWING}\nshow(fig, 'Runs fall from {name}', 'Nine dots in three rows')"
    said = f"# Says: the rank\nfrom IPython.display import Markdown\n\nMarkdown({SENTENCE!r})"
    table = "import pandas as pd\n\npd.DataFrame([range(30)]).add_prefix('column ')"
    alt = {"mystnb": {"image": {"alt": "A line that rises from 0 to 1"}}}
    cells = [
        new_markdown_cell(text),
        new_code_cell('profile = "quick"\nseed = 0', metadata={"tags": ["parameters"]}),
        new_code_cell(drawn, metadata={"tags": ["hide-input"]}),
        new_code_cell(DIAGRAM, metadata={"tags": ["hide-cell", "export"]}),
        new_code_cell(said.replace("NAME", name), metadata={"tags": ["remove-input"]}),
        new_markdown_cell("The text goes on."),
        new_code_cell(figure, metadata=alt),
        new_code_cell(table),
        new_markdown_cell(sections),
    ]
    if name == INTERACTIVE_CHAPTER:
        cells.append(new_code_cell(INTERACTIVE, metadata={"tags": ["hide-input"]}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.environ.get("JAHS_SITE"):
        return Path(os.environ["JAHS_SITE"])
    book = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book", book / "book")
    (book / "results").symlink_to(ROOT / "results")
    for name in ("_config.yml", "_toc.yml"):
        shutil.copyfile(ROOT / name, book / name)
    (book / "chapters").mkdir()
    for name in chapter_names():
        load_chapter(name)  # claims need the real ones
        nbformat.write(stand_in_chapter(name), book / "chapters" / f"{name}.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAHS_BOOK", str(book))
        return build(strict=True).parent


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Serve the site on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the browser has left the page
                super().handle()

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def visits(site: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> list[Visit]:
    """Every page of the site at every width."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install chromium or google-chrome")
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    pages = [page for page in pages if page != "index.html" and not page.startswith("_static/")]
    profile = tmp_path_factory.mktemp("chromium")

    async def visit_all() -> list[Visit]:
        async with browser_tab(profile) as tab:
            return [await tab.visit(address, page, w) for page in pages for w in WIDTHS]

    return asyncio.run(visit_all())


class Tab:
    """One tab, driven through the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.count, self.session = socket, 0, None
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        await self.socket.write_message(json.dumps(message))
        while (answer := await self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    async def receive(self) -> dict[str, Any]:
        text = await asyncio.wait_for(self.socket.read_message(), 30)
        assert text is not None, "Chromium has closed the connection"
        return json.loads(text)

    async def visit(self, address: str, page: str, width: int) -> Visit:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        await self.call("Page.navigate", url=f"{address}/{page}")
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(await self.receive())
        answer = await self.call(
            "Runtime.evaluate", expression=MEASURE, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, f"{page}: {answer['exceptionDetails']}"
        seen = json.loads(answer["result"]["value"])
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        got = [e["params"] for e in self.events if e["method"] == "Network.responseReceived"]
        failed = [r["response"]["url"] for r in got if r["response"]["status"] >= 400]
        return Visit(page, seen, [s["request"]["url"] for s in sent], failed, self.errors())

    def errors(self) -> list[str]:
        """What scripts have thrown, and what the browser or a script has logged as an error."""
        errors = []
        for event in self.events:
            match event:
                case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                    errors.append(
                        details.get("exception", details).get("description", str(details))
                    )
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as entry}}:
                    errors.append(f"{entry['text']} {entry.get('url', '')}")
                case {"method": "Runtime.consoleAPICalled", "params": {"type": "error"} as call}:
                    errors.append(str(call["args"]))
        return errors


@contextlib.asynccontextmanager
async def browser_tab(profile: Path) -> AsyncIterator[Tab]:
    """Start Chromium with a profile of its own, and end it."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:
        try:
            port = profile / "DevToolsActivePort"
            deadline = time.monotonic() + 30
            while not (port.exists() and len(port.read_text(encoding="utf-8").splitlines()) == 2):
                assert process.poll() is None, f"Chromium ended with status {process.poll()}"
                assert time.monotonic() < deadline, "Chromium did not open its port"
                await asyncio.sleep(0.05)
            number, path = port.read_text(encoding="utf-8").splitlines()
            request = HTTPRequest(f"ws://127.0.0.1:{number}{path}", request_timeout=30)
            tab = Tab(await websocket_connect(request, max_message_size=1 << 28))
            target = await tab.call("Target.createTarget", url="about:blank")
            attached = await tab.call("Target.attachToTarget", **target, flatten=True)
            tab.session = attached["sessionId"]
            for domain in ("Log", "Network", "Page", "Runtime"):
                await tab.call(f"{domain}.enable")
            yield tab
        finally:
            process.terminate()


def test_the_address_of_the_site_leads_to_the_title_page(site: Path) -> None:
    assert "url=book/index.html" in (site / "index.html").read_text(encoding="utf-8")


def test_every_request_goes_to_the_book_itself(visits: list[Visit], address: str) -> None:
    host = urlsplit(address).netloc
    foreign = {
        f"{visit}: {url}"
        for visit in visits
        for url in visit.requests
        if urlsplit(url).scheme not in ("about", "blob", "data") and urlsplit(url).netloc != host
    }
    assert not foreign


def test_every_request_is_recorded_and_answered(visits: list[Visit], address: str) -> None:
    for visit in visits:
        assert f"{address}/{visit.page}" in visit.requests
        assert not visit.failed


def test_equations_are_typeset(visits: list[Visit]) -> None:
    chapters = [visit for visit in visits if visit.page.startswith("chapters/")]
    assert chapters
    assert all(visit.seen["equations"] for visit in chapters)
    broken = {str(v): v.seen["untypeset"] + v.seen["errors"] for v in visits}
    assert not {where: what for where, what in broken.items() if what}


def test_no_page_scrolls_sideways(visits: list[Visit]) -> None:
    assert not {
        str(v): v.seen["scroll_width"] for v in visits if v.seen["scroll_width"] > v.seen["width"]
    }


def test_nothing_reaches_over_the_column(visits: list[Visit]) -> None:
    assert not {str(visit): visit.seen["too_wide"] for visit in visits if visit.seen["too_wide"]}


def test_every_image_has_an_alternative_text(visits: list[Visit]) -> None:
    def missing(alt: str | None) -> bool:
        return not alt or alt.endswith((".png", ".svg", ".jpg"))  # the file's name says nothing

    # the stand-in site has an image; chapters may have none, their figures are elements of a page
    assert "JAHS_SITE" in os.environ or any(visit.seen["alts"] for visit in visits)
    assert not {str(v): v.seen["alts"] for v in visits if any(map(missing, v.seen["alts"]))}


def test_interactive_figures_are_drawn_and_only_their_pages_load_the_scripts(
    visits: list[Visit],
) -> None:
    assert any(visit.seen["charts"] for visit in visits)
    for visit in visits:
        loads = any(url.endswith("/_static/vega.js") for url in visit.requests)
        assert visit.seen["drawn"], visit
        assert loads == bool(visit.seen["charts"]), visit


def test_no_page_logs_an_error(visits: list[Visit]) -> None:
    assert not {str(visit): visit.errors for visit in visits if visit.errors}


def figures(visits: list[Visit]) -> list[tuple[str, dict[str, Any]]]:
    looks = [(str(visit), look) for visit in visits for look in visit.seen["looks"]]
    assert {look["theme"] for _, look in looks} == {"dark", "light"}
    return looks


def test_figures_lie_on_the_page_of_both_themes_without_a_slab(visits: list[Visit]) -> None:
    for where, look in figures(visits):
        assert (look["ground"] < 0.1) == (look["theme"] == "dark"), f"{where}: {look}"


def test_text_of_figures_is_legible_in_both_themes(visits: list[Visit]) -> None:
    assert not [(where, look) for where, look in figures(visits) if look["contrast"] < 4.5]


def test_text_of_figures_is_legible_on_a_phone(visits: list[Visit]) -> None:
    heights = [height for _, look in figures(visits) for height in look["heights"]]
    assert min(heights) > 8  # pixels: what is set "small", the least that is allowed; else 9.7


def test_text_of_figures_is_in_the_font_of_the_page(visits: list[Visit]) -> None:
    for where, look in figures(visits):
        assert set(look["fonts"]) <= {look["font"]}, where


def test_figures_have_an_alternative_text_and_ids_of_their_own(visits: list[Visit]) -> None:
    assert all(look["alt"] for _, look in figures(visits))
    assert not {str(visit): visit.seen["ids_twice"] for visit in visits if visit.seen["ids_twice"]}


def test_folded_code_is_closed_under_a_prompt_that_names_it(visits: list[Visit]) -> None:
    folded = [part for visit in visits for part in visit.seen["folded"]]
    assert folded
    assert not [part for part in folded if part["open"] or not part["prompt"].startswith("Code: ")]


def test_a_computed_sentence_looks_like_a_written_one(visits: list[Visit]) -> None:
    said = [sentence for visit in visits for sentence in visit.seen["said"]]
    assert said
    assert not [sentence["text"] for sentence in said if not sentence["same"]]
