"use strict";
(() => {
  const COLOURS = 7, HEIGHT = 200, FEW = 60;
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const places = [...document.querySelectorAll(".plot")];
  const severalRuns = charts.some((chart) => chart.lines.some((line) => line.run > 0));

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function figure(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
    return String(Number(value.toPrecision(4)));
  }

  // Few lines of a logarithmic scale: uPlot draws one for each multiple of a power of ten.
  function powers(plot, axis, min, max) {
    const first = Math.floor(Math.log10(min)), last = Math.ceil(Math.log10(max));
    const every = Math.max(1, Math.ceil((last - first) / 5));
    const multiples = max < 100 * min ? [1, 2, 5] : [1];
    const found = [];
    for (let power = first; power <= last; power += every) {
      for (const multiple of multiples) found.push(Number(`${multiple}e${power}`));
    }
    return found.filter((value) => value >= min && value <= max);
  }

  // By itself uPlot ends a logarithmic scale at powers of ten, which may leave half of the chart empty.
  const tightRange = (plot, min, max) => (min === null ? [1, 10] : [min / 1.1, max * 1.1]);

  // Of one run the colour tells the metric; of several runs it tells the run, and the dash the metric.
  const strokeOf = (line) => colour(`--c${(severalRuns ? line.run : line.kind) % COLOURS}`);
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]], BORDERS = ["solid", "dashed", "dotted", "double"];

  function series(line) {
    const stroke = strokeOf(line);
    const few = line.values.filter((value) => value !== null).length <= FEW;
    return {
      label: line.label,
      stroke,
      width: line.eval ? 2.5 : 1.5,
      dash: severalRuns ? DASHES[line.kind % DASHES.length] : undefined,
      spanGaps: true,
      points: { show: few, size: line.eval ? 7 : 4, fill: stroke },
      value: (plot, value) => figure(value),
    };
  }

  function draw(place) {
    const chart = charts[Number(place.dataset.chart)];
    const axis = { stroke: colour("--soft-ink"), grid: { stroke: colour("--line"), width: 1 },
      ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const options = {
      width: place.clientWidth,
      height: HEIGHT,
      scales: { x: { time: false }, y: chart.log ? { distr: 3, range: tightRange } : {} },
      axes: [
        { ...axis, size: 30, values: (plot, splits) => splits.map((split) => (Number.isInteger(split) ? split : "")) },
        { ...axis, size: 66, ...(chart.log ? { splits: powers, filter: (plot, splits) => splits } : {}),
          values: (plot, splits) => splits.map(figure) },
      ],
      series: [{ label: "step" }, ...chart.lines.map(series)],
      cursor: { sync: { key: "step", setSeries: false, scales: ["x", null] }, drag: { x: true, y: false } },
      legend: { markers: {
        stroke: (plot, index) => strokeOf(chart.lines[index - 1]),
        fill: (plot, index) => (severalRuns ? "transparent" : strokeOf(chart.lines[index - 1])),
        dash: (plot, index) => BORDERS[(severalRuns ? chart.lines[index - 1].kind : 0) % BORDERS.length],
      } },
    };
    place.replaceChildren();
    place.plot = new uPlot(options, [chart.steps, ...chart.lines.map((line) => line.values)], place);
    reachableLegend(place);
  }

  // The legend of uPlot hears clicks alone.
  function reachableLegend(place) {
    for (const head of [...place.querySelectorAll(".u-legend .u-series th")].slice(1)) {
      head.tabIndex = 0;
      head.setAttribute("role", "button");
      head.setAttribute("aria-pressed", "true");
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        head.click();
      });
      head.addEventListener("click", () =>
        head.setAttribute("aria-pressed", String(!head.closest(".u-series").classList.contains("u-off"))));
    }
  }

  function onKey(event) {
    const plot = event.currentTarget.plot;
    const steps = plot.data[0];
    if (event.key === "Escape") {
      plot.setScale("x", { min: steps[0], max: steps[steps.length - 1] });
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const move = event.key === "ArrowRight" ? 1 : -1;
      const from = plot.cursor.idx ?? (move > 0 ? -1 : steps.length);
      const index = Math.min(Math.max(from + move, 0), steps.length - 1);
      plot.setCursor({ left: plot.valToPos(steps[index], "x"), top: plot.over.clientHeight / 2 });
    } else {
      return;
    }
    event.preventDefault();
  }

  const drawAll = () => places.forEach(draw);
  drawAll();
  places.forEach((place) => place.addEventListener("keydown", onKey));
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.clientWidth !== target.plot.width) target.plot.setSize({ width: target.clientWidth, height: HEIGHT });
    }
  });
  places.forEach((place) => observer.observe(place));
  // Colours are drawn into the canvas, so a change of the colours needs a new one.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = String(places.length);
})();
