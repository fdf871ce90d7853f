// Draws one interactive figure; interactive.py calls it on every page that has one.
(id, packages, chart) => {
  const figure = document.currentScript?.closest("figure") ?? document.getElementById(id);
  const root = document.documentElement.dataset.content_root; // set on pages of the built site
  const sources =
    root === undefined
      ? packages.map((name) => `https://cdn.jsdelivr.net/npm/${name}`)
      : [`${root}_static/vega.js`];
  const load = (source) =>
    new Promise((done, failed) => {
      const script = document.createElement("script");
      Object.assign(script, { src: source, onload: done, onerror: failed });
      document.head.append(script);
    });
  const loadAll = async () => {
    const amd = window.define;
    window.define = undefined; // where require.js stands, the scripts would hide behind it
    try {
      for (const source of sources) await load(source);
    } finally {
      window.define = amd;
    }
  };
  const draw = async () => {
    const place = figure.querySelector(".jahs-chart");
    chart.config.font = getComputedStyle(figure).fontFamily; // measured as it is drawn
    const { view } = await vegaEmbed(place, chart, { renderer: "svg", actions: false });
    const says = () => (figure.querySelector(".jahs-says").textContent = view.signal("says"));
    view.addSignalListener("says", says);
    says();
    for (const radios of figure.querySelectorAll(".vega-bind-radio")) {
      radios.setAttribute("role", "radiogroup");
      radios.setAttribute("aria-label", radios.previousSibling.textContent);
    }
  };
  window.jahsVega ??= loadAll();
  window.jahsVega.then(draw, () => delete window.jahsVega); // no scripts: the picture stays
}
