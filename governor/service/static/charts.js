// The two charts, drawn by uPlot (vendor/). Colours come from the style sheet, so both schemes stand there alone.

import { duration } from "./words.js";

const scheme = matchMedia("(prefers-color-scheme: dark)");
const charts = new Set();
const HEIGHT = 240;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A chart in `host` that follows its width and the colour scheme. `options()` is asked anew for each drawing. */
function chart(host, options) {
  let plot = null;
  let data = null;
  const draw = () => {
    plot?.destroy();
    plot = null;
    if (data && host.clientWidth) {
      plot = new uPlot({ width: host.clientWidth, height: HEIGHT, ...options() }, data, host);
    }
  };
  const size = () => {
    if (!host.clientWidth) return;
    if (plot) plot.setSize({ width: host.clientWidth, height: HEIGHT });
    else draw();
  };
  new ResizeObserver(() => requestAnimationFrame(size)).observe(host);
  charts.add(draw);
  return {
    show(given) {
      data = given;
      if (plot) plot.setData(data);
      else draw();
    },
  };
}

scheme.addEventListener("change", () => charts.forEach((draw) => draw()));

// Steps of an axis of time, in seconds: those that clocks have.
const MINUTE = 60;
const HOUR = 3600;
const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, ...[1, 2, 5, 10, 15, 30].map((each) => each * MINUTE)].concat(
  [1, 2, 4, 6, 12, 24, 48, 96, 240, 720].map((each) => each * HOUR),
);

function axes(xValues, yValues, label) {
  const common = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false } };
  return [
    { ...common, values: xValues, space: 76, size: 32, incrs: STEPS },
    { ...common, values: yValues, size: 46, ...(label && { label, labelSize: 18, labelGap: 2 }) },
  ];
}

const clock = (at, second = undefined) =>
  new Date(at * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second });

/** `step()`: seconds of a bar. Launches as bars, 429s as triangles above them: told apart by shape, not by colour alone. */
export function paceChart(host, step) {
  return chart(host, () => ({
    cursor: { y: false, points: { show: false } },
    legend: { markers: { show: false } },
    scales: { x: { range: (_, low, high) => [low - step() / 2, high + step() / 2] }, y: { range: (_, low, high) => [0, Math.max(4, Math.ceil(high * 1.15))] } },
    axes: axes((_, values) => values.map((at) => clock(at, at % MINUTE ? "2-digit" : undefined)), (_, values) => values.map((value) => (Number.isInteger(value) ? String(value) : ""))),
    series: [
      { label: "from", value: (_, at) => (at === null ? "–" : clock(at, "2-digit")) },
      {
        label: "■ launches",
        class: "launches",
        value: (_, value) => value ?? "–",
        fill: colour("accent"),
        stroke: colour("accent"),
        width: 0,
        paths: uPlot.paths.bars({ size: [0.8, 14] }),
        points: { show: false },
      },
      { label: "▲ 429s", class: "throttled", value: (_, value) => value ?? "–", stroke: colour("bad"), width: 0, paths: () => null, points: { show: triangles } },
    ],
  }));
}

function triangles(plot, index) {
  const { ctx } = plot;
  const size = 5 * devicePixelRatio;
  ctx.save();
  ctx.fillStyle = colour("bad");
  // An edge in the background's colour: they often lie on a bar.
  ctx.strokeStyle = colour("card");
  ctx.lineWidth = 3 * devicePixelRatio;
  plot.data[index].forEach((value, i) => {
    if (!value) return;
    const x = plot.valToPos(plot.data[0][i], "x", true);
    const y = plot.valToPos(value, "y", true);
    ctx.beginPath();
    ctx.moveTo(x, y - size);
    ctx.lineTo(x + size, y + size);
    ctx.lineTo(x - size, y + size);
    ctx.closePath();
    ctx.stroke();
    ctx.fill();
  });
  ctx.restore();
  return false;
}

/** Share done over time: today's dashed, the proposed solid, each with its band. Data: see `curvesOf`. */
export function curvesChart(host) {
  return chart(host, () => {
    const hidden = (label, name) => ({ label, stroke: colour(name), width: 0, points: { show: false } });
    const main = (label, name, dash) => ({
      label,
      stroke: colour(name),
      width: 2,
      dash,
      points: { show: false },
      value: (_, share) => (share === null ? "–" : `${Math.round(share)} %`),
    });
    return {
      cursor: { y: false },
      legend: { show: false },
      scales: { x: { time: false }, y: { range: [0, 102] } },
      axes: axes(
        (_, values) => values.map((value) => (value === 0 ? "0" : duration(value).replace(/ 00 (s|min)$|\.0(?= s)/, ""))),
        (_, values) => values.map((value) => `${value} %`),
        "requests done",
      ),
      bands: [
        { series: [1, 3], fill: colour("today-band") },
        { series: [4, 6], fill: colour("accent-band") },
      ],
      series: [
        {},
        hidden("", "muted"),
        main("today’s", "muted", [8, 5]),
        hidden("", "muted"),
        hidden("", "accent"),
        main("these", "accent"),
        hidden("", "accent"),
      ],
    };
  });
}

/** The answer of /what-if as columns over one grid of times: p5, p50 and p95 of today's, then of the proposed. */
export function curvesOf(answer, points = 240) {
  const sides = [answer.today, answer.proposed];
  const end = Math.max(...sides.map((side) => side.finish_s.p95), 0.001) * 1.02;
  const grid = Array.from({ length: points + 1 }, (_, i) => (end * i) / points);
  const columns = sides.flatMap((side) =>
    ["p5_s", "p50_s", "p95_s"].map((name) => {
      const at = [0, ...side.milestones.map((each) => each[name])];
      const share = [0, ...side.milestones.map((each) => 100 * each.share)];
      return grid.map((time) => between(at, share, time));
    }),
  );
  return [grid, ...columns];
}

function between(at, share, time) {
  if (time >= at[at.length - 1]) return share[share.length - 1];
  let i = 1;
  while (at[i] <= time) i += 1;
  return share[i - 1] + ((share[i] - share[i - 1]) * (time - at[i - 1])) / (at[i] - at[i - 1] || 1);
}
