"use strict";
// Draws what the element "charts" holds (opentau_train/pages/charts.py). Colours of axes and texts are the style
// sheet's, so that a change from light to dark, or to paper, needs no new drawing.
(() => {
  const page = JSON.parse(document.getElementById("charts").textContent);
  const hidden = new Set();
  const choice = { axis: Object.keys(page.axes)[0], log: false, smooth: 0 };
  const recorded = { name: "recorded", colour: "#8a929c", dash: "solid" };

  const element = (number) => document.getElementById(`chart-${number}`);

  // The running mean that forgets: every value has its share from the first one on.
  function smoothed(values, keep) {
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  function traces(chart) {
    const made = [];
    for (const curve of chart.curves) {
      if (hidden.has(curve.series)) continue;
      const series = curve.series < 0 ? recorded : page.series[curve.series];
      const x = chart.x_title ? curve.x.own : curve.x[choice.axis] || curve.x.step;
      const smooth = chart.smooth && choice.smooth > 0;
      const dots = chart.points || curve.y.length === 1;
      const name = curve.name ? `${series.name}, ${curve.name}` : series.name;
      const line = { color: series.colour, dash: series.dash, width: curve.series < 0 ? 3 : 1.6 };
      const plain = {
        x, y: curve.y, name: text(name), type: "scatter", mode: dots ? "lines+markers" : "lines", line,
        marker: { size: 5, color: series.colour }, hovertemplate: "%{y:.5g}", connectgaps: false,
      };
      if (curve.errors.length) {
        plain.error_y = { type: "data", array: curve.errors, color: series.colour, thickness: 1.2, width: 3 };
      }
      if (smooth) {
        made.push({ ...plain, opacity: 0.25, hoverinfo: "skip", hovertemplate: null });
        made.push({ ...plain, y: smoothed(curve.y, choice.smooth), error_y: undefined });
      } else {
        made.push(plain);
      }
    }
    return made;
  }

  // Plotly reads some HTML in names: a name is text.
  function text(name) {
    return name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function layout(chart, small) {
    const font = { color: "#808890", size: small ? 10 : 12 };
    const axis = { automargin: true, zeroline: false, linewidth: 1, showline: true, gridwidth: 1 };
    const log = chart.log && choice.log;
    const y = { ...axis, type: log ? "log" : "linear", title: { text: text(chart.unit), font, standoff: 6 } };
    if (!log && chart.low !== null && chart.high !== null) y.range = [chart.low, chart.high];
    else if (!log && chart.low !== null) y.rangemode = "tozero";
    return {
      font, showlegend: false, hovermode: "x unified", height: small ? 190 : 270,
      margin: { l: 48, r: 12, t: 10, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: "#ffffff", font: { color: "#1c1e21", size: 11 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "#a0a7b0", activecolor: "#5f87b7" },
      xaxis: { ...axis, title: { text: text(chart.x_title || page.axes[choice.axis]), font, standoff: 4 } },
      yaxis: y,
    };
  }

  const config = {
    responsive: true, displaylogo: false, displayModeBar: true, toImageButtonOptions: { scale: 2 },
    modeBarButtons: [["zoom2d", "pan2d", "autoScale2d", "toImage"]], // none that sends anything anywhere
  };

  // A chart is drawn when it comes near to what is seen: a page may have a hundred.
  const stale = new Set(page.charts.keys());
  const near = new Set();

  function draw(number) {
    const chart = page.charts[number], place = element(number);
    stale.delete(number);
    Plotly.react(place, traces(chart), layout(chart, place.closest(".small") !== null), config);
  }

  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const number = Number(entry.target.id.slice("chart-".length));
      if (entry.isIntersecting) near.add(number);
      else near.delete(number);
      if (entry.isIntersecting && stale.has(number)) draw(number);
    }
  }, { rootMargin: "400px" });
  page.charts.forEach((_, number) => observer.observe(element(number)));

  function refresh() {
    page.charts.forEach((_, number) => stale.add(number));
    near.forEach(draw);
  }

  for (const button of document.querySelectorAll("button[data-series]")) {
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const series = Number(button.dataset.series);
      const shown = hidden.delete(series);
      if (!shown) hidden.add(series);
      button.setAttribute("aria-pressed", String(shown));
      refresh();
    });
  }
  const chosen = (id, take) => document.getElementById(id).addEventListener("input", (event) => {
    take(event.target);
    refresh();
  });
  chosen("axis", (select) => { choice.axis = select.value; });
  chosen("log", (box) => { choice.log = box.checked; });
  chosen("smooth", (range) => { choice.smooth = Number(range.value); });

  // Paper shows all charts, in its own width, which they must have before it is printed: Plotly resizes later.
  function turn(paper) {
    document.body.classList.toggle("paper", paper);
    page.charts.forEach((_, number) => Plotly.purge(element(number)));
    refresh();
    if (paper) [...stale].forEach(draw);
  }
  window.addEventListener("beforeprint", () => turn(true));
  window.addEventListener("afterprint", () => turn(false));
})();
