"""Interactive figures: Vega-Altair charts that compute in the browser, over a still picture.

The built site has Vega among its own files; JupyterLab and Colab get it from jsDelivr, as Altair's
own HTML does. Without scripts, and until they come, the picture stands.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import altair
import pandas as pd
import vl_convert
from IPython.display import display

PACKAGES = [
    f"vega@{altair.VEGA_VERSION}",
    f"vega-lite@{altair.VEGALITE_VERSION}",
    f"vega-embed@{altair.VEGAEMBED_VERSION}",
]
INK = "currentColor"  # the page's, light or dark
TEXT = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12}
CONFIG = {
    "background": "transparent",
    "axis": TEXT | {"domainColor": INK, "tickColor": INK, "gridColor": INK, "gridOpacity": 0.15},
    "legend": TEXT,
    "rule": {"color": INK},
    "text": {"color": INK, "fontSize": 12},
    "view": {"stroke": None},
}


def interactive(
    chart: altair.TopLevelMixin, title: str, alt: str, says: str, table: pd.DataFrame, number: int
) -> None:
    """Display a chart whose controls make the browser compute, under its title.

    title: its question or finding. alt: what is to be seen, and what the controls do. says: the
    text that the chart's parameter `says` has at the start; the page shows it as it changes, to
    screen readers too. table: the values, for those who cannot see or point. number: counts the
    figures of a page. Parameters need names that are the page's own, charts one view or layers.
    """
    specification = chart.properties(width="container", description=alt).to_dict()
    specification["config"] = CONFIG
    script = (Path(__file__).parent / "interactive.js").read_text(encoding="utf-8")
    values = (name := f"interactive-{number}", PACKAGES, specification)
    given = ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
    given = given.replace("</", r"<\/")  # no text in the chart may end the script
    page = [
        f'<figure class="jahs-figure jahs-interactive" id="{name}" style="max-width: 34rem">',
        f"<figcaption><strong>{html.escape(title)}</strong></figcaption>",
        f'<div class="jahs-chart" style="width: 100%">{_still(specification, alt, number)}</div>',
        f'<p class="jahs-says" aria-live="polite">{html.escape(says)}</p>',
        f"<details><summary>The values as a table</summary>{table.to_html(border=0)}</details>",
        f"<script>\n({script})({given});\n</script>\n</figure>",
    ]
    plain = f"Interactive figure {number}: {title}\n{says}"
    display({"text/html": "\n".join(page), "text/plain": plain}, raw=True)


def _still(specification: dict, alt: str, number: int) -> str:
    """The chart as it starts: for print, for pages without scripts, and for the first second."""
    drawing = vl_convert.vegalite_to_svg(specification | {"width": 440})
    drawing = re.sub(r'(url\(#|id=")', rf"\1interactive-{number}-", drawing)
    size = f'role="img" aria-label="{html.escape(alt)}" style="max-width: 100%; height: auto"'
    return drawing.replace("<svg ", f"<svg {size} ", 1)
