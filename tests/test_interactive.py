"""Interactive figures: what the page holds, and what Chromium computes when a control moves."""

import asyncio
import functools
import http.server
import itertools
import json
import re
import threading

import altair as alt
import nbformat
import pandas as pd
import pytest
import vl_convert
from test_site import CHROMIUM, browser_tab

from jahs_utils import load_chapter, read_results
from jahs_utils.book import stage_vega
from jahs_utils.chapters import chapter_path
from jahs_utils.interactive import PACKAGES, interactive

WAIT = "while (!document.querySelector('.vega-bindings')) await new Promise(r => setTimeout(r, 20))"
NUMBER = r"\d+(?:\.\d+)?"


def figure_of(name: str) -> str:
    """The HTML of the interactive figure that a chapter stores."""
    cells = nbformat.read(chapter_path(name), as_version=4).cells
    pages = (o.get("data", {}).get("text/html", "") for c in cells for o in c.get("outputs", []))
    return next(page for page in pages if "jahs-interactive" in page)


def small(number: int = 1, says: str = "twice 1 is 2") -> dict:
    """What a figure with one slider displays."""
    slider = alt.binding_range(min=1, max=9, step=1, name="a number")
    chart = alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(x="x:Q")
    chart = chart.add_params(
        alt.param("n", bind=slider, value=1),
        alt.param("says", expr="'twice ' + n + ' is ' + 2 * n"),
    )
    shown = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jahs_utils.interactive.display", lambda data, raw: shown.update(data))
        table = pd.DataFrame({"x": [1]})
        interactive(chart, "Twice", 'a "point" </script>', says, table, number)
    return shown


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """The folder in which the build has put the scripts."""
    source = tmp_path_factory.mktemp("source")
    (source / "page.ipynb").write_text(figure_of("00_training"), encoding="utf-8")
    (source / "book/_static").mkdir(parents=True)
    stage_vega(source)
    return source / "book/_static"


@pytest.fixture
def look(tmp_path, static):
    """A function that opens a figure in Chromium and evaluates expressions; requests go along."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: install chromium or google-chrome")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    def opened(figure: str, expressions: list[str], root: str = 'data-content_root="./"'):
        page = f"<!doctype html><html {root}><meta charset='utf-8'><link rel='icon' href='data:,'>"
        page += "<script>const _ = 0</script>"  # as Sphinx's scripts have it
        (tmp_path / "page.html").write_text(f"{page}<body>{figure}", encoding="utf-8")
        (tmp_path / "_static").symlink_to(static)
        handler = functools.partial(Quiet, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            home = f"http://127.0.0.1:{server.server_port}/"
            try:
                return asyncio.run(visit(f"{home}page.html", home, expressions))
            finally:
                server.shutdown()

    async def visit(address: str, home: str, expressions: list[str]):
        async with browser_tab(tmp_path / "chromium") as tab:
            await tab.call("Network.setBlockedURLs", urls=["https://*"])
            await tab.call("Page.navigate", url=address)
            values = []
            for expression in expressions:
                body = f"(async () => {{ {expression} }})()"
                options = {"awaitPromise": True, "returnByValue": True}
                answer = await tab.call("Runtime.evaluate", expression=body, **options)
                assert "exceptionDetails" not in answer, answer
                values.append(answer["result"].get("value"))
            asked = [e for e in tab.events if e["method"] == "Network.requestWillBeSent"]
            errors = [e for e in tab.events if e["method"] == "Runtime.exceptionThrown"]
            assert errors == []
            return values, [e["params"]["request"]["url"].replace(home, "") for e in asked]

    return opened


def test_the_versions_of_the_scripts_are_those_that_altair_writes_for():
    of_bundle = {
        "vega": vl_convert.get_vega_version(),
        "vega-lite": alt.VEGALITE_VERSION,
        "vega-embed": vl_convert.get_vega_embed_version(),
    }
    assert re.match(r"\d+\.\d+", alt.VEGALITE_VERSION)[0] in vl_convert.get_vegalite_versions()[-1]
    for package in PACKAGES:
        name, version = package.split("@")
        assert f"{of_bundle[name]}.".startswith(f"{version}.")


def test_a_book_without_such_figures_has_no_scripts(tmp_path):
    (tmp_path / "page.ipynb").write_text("a page", encoding="utf-8")
    stage_vega(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["page.ipynb"]


def test_a_figure_is_numbered_and_the_same_every_time():
    assert small(3) == small(3)
    assert 'id="interactive-3"' in small(3)["text/html"]
    assert small(3)["text/plain"] == "Interactive figure 3: Twice\ntwice 1 is 2"


def test_a_page_without_scripts_shows_a_picture_with_its_description_and_the_values():
    page = re.sub("<script>.*?</script>", "", small()["text/html"], flags=re.DOTALL)
    assert '<svg role="img" aria-label="a &quot;point&quot; &lt;/script&gt;"' in page
    assert "<details><summary>The values as a table</summary><table" in page


def test_no_text_of_a_chart_ends_its_script():
    page = small()["text/html"]
    assert page.count("</script>") == 1


def test_moving_a_slider_changes_what_the_figure_says(look):
    read = "return document.querySelector('.jahs-says').textContent"
    move = (
        "const slider = document.querySelector('input[name=n]'); slider.value = 7;"
        "slider.dispatchEvent(new Event('input'));"
        f"for (let k = 0; k < 200 && !document.body.textContent.includes('twice 7'); k++)"
        f"  await new Promise(r => setTimeout(r, 10)); {read}"
    )
    label = "return document.querySelector('input[name=n]').labels[0].textContent"
    values, asked = look(small(says="not yet")["text/html"], [f"{WAIT}; {read}", move, label])
    assert values[:2] == ["twice 1 is 2", "twice 7 is 14"]
    assert values[2].startswith("a number")
    assert asked == ["page.html", "_static/vega.js"]


def test_outside_the_book_scripts_come_from_the_cdn_and_without_them_the_picture_stays(look):
    later = "await new Promise(r => setTimeout(r, 1500));"
    stays = f"{later} return document.querySelectorAll('svg[role=img]').length"
    values, asked = look(small()["text/html"], [stays], root="")
    assert values == [1]
    assert asked == ["page.html", f"https://cdn.jsdelivr.net/npm/{PACKAGES[0]}"]


def test_in_a_browser_chapter_00_ends_where_coordinate_search_does(look):
    chapter = load_chapter("00_training")
    rows = chapter.label(read_results("00_training", "joint_grid", "standard"))
    scores = rows.groupby(chapter.AXES)["accuracy"].mean()
    test = rows.groupby(chapter.AXES)["test_accuracy"].mean().mul(100)
    names = ("learning rate first", "architecture first")
    orders = dict(zip(names, sorted(chapter.ORDERS)))
    states = list(itertools.product(orders, *(level for level in scores.index.levels)))

    said = """
    const figure = document.querySelector('.jahs-interactive');
    const control = name => [...figure.querySelectorAll(`input[name=${name}]`)];
    const set = (name, value) => {
      for (const input of control(name)) {
        if (input.type === 'radio' && input.value === String(value)) input.click();
        if (input.type === 'range') {
          input.value = value;
          input.dispatchEvent(new Event('input', {bubbles: true}));
        }
      }
    };
    const says = [figure.querySelector('.jahs-says').textContent];
    for (const [order, rate, channels, layers] of STATES) {
      set('order', order); set('rate', rate); set('channels', channels); set('layers', layers);
      const start = `From ${layers} × ${channels} channels at rate ${rate}, ${order} `;
      const said = () => figure.querySelector('.jahs-says').textContent;
      for (let k = 0; k < 200 && !said().startsWith(start); k++)
        await new Promise(done => setTimeout(done, 10));
      says.push(said());
    }
    return says;
    """
    page = figure_of("00_training")
    plain = [[order, *(float(v) for v in point)] for order, *point in states]
    (_, says), asked = look(page, [WAIT, said.replace("STATES", json.dumps(plain))])

    expected = []
    for order, rate, width, depth in states:
        start = dict(zip(chapter.AXES, (rate, width, depth)))
        end = tuple(chapter.coordinate_search(scores, start, orders[order]).values())
        numbers = [depth, width, rate, end[2], end[1], end[0]]
        paid = [f"{test[end]:.2f}", f"{test[scores.idxmax()] - test[end]:.2f}"]
        expected.append([*(f"{number:g}" for number in numbers), *paid])
    found = [re.findall(NUMBER, text) for text in says[1:]]
    assert found == expected
    assert says[0] in page  # before anything moves, the browser says what Python wrote
    assert asked == ["page.html", "_static/vega.js"]
