"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");

  // The style sheet is the one place that knows colours.
  function theme(width, longest) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const colours = (name) => colour(name).split(/\s+/);
    const [ink, muted, line] = ["ink", "muted", "line"].map(colour);
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: muted, titleColor: ink, labelFont: font, titleFont: font };
    const accent = colour("accent");
    return {
      background: "transparent",
      font,
      view: { stroke: null },
      axis: {
        ...text, titleFontWeight: 500, titleFontSize: 12, labelFontSize: 11.5, titlePadding: 8,
        gridColor: line, domainColor: muted, tickColor: muted,
        labelSeparation: 6, labelLimit: narrow.matches ? 120 : 260, titleLimit: narrow.matches ? 320 : 700,
      },
      legend: {
        ...text, orient: "top", titleFontWeight: 500, titleFontSize: 12, labelFontSize: 11.5,
        columns: Math.max(1, Math.floor((width - 60) / (Math.min(longest * 6.6, 240) + 30))),
        labelLimit: 240, symbolLimit: 60,
        titleLimit: 300, symbolOpacity: 1,
      },
      range: {
        category: colours("category"),
        diverging: colours("load"),
        ordinal: { scheme: colours("scale") },
        ramp: { scheme: colours("scale") },
      },
      mark: { color: accent },
      point: { color: accent }, circle: { color: accent }, line: { color: accent },
      bar: { color: accent }, rule: { color: accent }, text: { color: ink, fill: ink, font },
      style: { base: { stroke: muted } },
    };
  }

  let round = 0;
  async function draw() {
    const mine = ++round;
    for (const chart of document.querySelectorAll(".chart")) {
      if (mine !== round) return;
      const spec = JSON.parse(chart.nextElementSibling.textContent);
      try {
        await vegaEmbed(chart, spec, {
          mode: "vega-lite", renderer: "svg", ast: true, config: theme(chart.clientWidth, spec.usermeta.longestLabel),
          actions: narrow.matches ? false : { export: true, source: false, compiled: false, editor: false },
          tooltip: { theme: dark.matches ? "dark" : "light" },
        });
        chart.dataset.drawn = "yes";
      } catch (error) {
        console.error("chart not drawn:", chart.getAttribute("aria-label"), error);
        chart.textContent = "This chart could not be drawn: " + error;
      }
    }
    document.documentElement.dataset.charts = "drawn";
  }

  dark.addEventListener("change", draw);
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(draw, 250);
  });
  draw();
})();
