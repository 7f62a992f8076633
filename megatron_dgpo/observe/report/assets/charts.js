// Curves of a run's metrics: small SVG charts with ticks, hover values, evaluations as points, advisories.

const CHART = { height: 190, left: 56, right: 12, top: 14, bottom: 26 };
const MOST_PLAIN = 7; // Characters of a tick's label before an exponent may replace zeros.
const LABEL_PIXELS = 6.6; // Of a character of a tick's label, at most.

// [title, [metrics], options]; a chart without any of its metrics is left out.
const CHARTS = [
  ["Reward", ["reward"], {}],
  ["Effective token fraction", ["credit_effective_fraction"], {}],
  ["Share of credit on the heaviest tokens", ["credit_top1_share", "credit_top10_share"], {}],
  ["Largest weight", ["credit_weight_max"], {}],
  ["Effective fraction, right and wrong answers",
    ["credit_effective_fraction_right", "credit_effective_fraction_wrong"], {}],
  ["Top 10% share, right and wrong answers", ["credit_top10_share_right", "credit_top10_share_wrong"], {}],
  ["Correlation of weight with position", ["credit_position_correlation"], {}],
  ["Squared Hellinger distance", ["hellinger_p50", "hellinger_p90", "hellinger_p99", "hellinger_p10"], { log: true }],
  ["Entropy, nats", ["entropy_p50", "entropy_p90", "entropy_p99", "entropy_p10"], { log: true }],
  ["Mean entropy, nats", ["entropy"], {}],
  ["Log-prob gap, trainer and engine", ["log_prob_gap", "log_prob_gap_max"], { log: true }],
  ["Clipped tokens", ["clip_fraction", "clip_low_fraction"], {}],
  ["Response length, tokens", ["response_length", "response_length_max"], {}],
  ["Truncated responses", ["truncated"], {}],
  ["Groups without variance", ["zero_variance_groups"], {}],
  ["Staleness, versions", ["staleness"], {}],
  ["Gradient norm", ["grad_norm"], {}],
  ["Learning rate", ["learning_rate"], {}],
  ["Tokens per second", ["tokens_per_second"], {}],
];

function niceTicks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const place = [1, 2, 5, 10].findIndex((m) => m * power >= rough);
  // A step between whose multiples the range falls but for one is too large.
  const [few, more] = [place, place - 1].map((at) => multiples([0.5, 1, 2, 5, 10][at + 1] * power, low, high));
  return few.length > 1 ? few : more;
}

function multiples(step, low, high) {
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9 && out.length < 50; k++) out.push(k * step);
  return out;
}

// The power of ten of the last digit that ascending ticks need: that of their distance, or, where these are
// the powers of a logarithmic axis, of two digits of the smallest.
function lastDigit(ticks) {
  const power = (v) => Math.floor(Math.log10(v) + 1e-6);
  const steps = ticks.slice(1).map((v, place) => v - ticks[place]);
  const smallest = Math.min(...ticks.filter((v) => v !== 0).map(Math.abs));
  const step = Math.min(...steps);
  return smallest < step * 0.999 || !steps.length ? power(smallest) - 1 : power(step);
}

// Labels of an axis's ticks, all of one notation, with the digits that tell them apart and no more.
function tickLabels(ticks) {
  if (ticks.every((v) => v === 0)) return ticks.map(() => "0");
  const last = lastDigit(ticks);
  const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  const plain = (v) => (v === 0 ? "0" : trimmed(v.toFixed(Math.max(0, -last))));
  const exponential = (v) => {
    if (v === 0) return "0";
    const digits = Math.min(15, Math.max(0, Math.floor(Math.log10(Math.abs(v)) + 1e-12) - last));
    const [mantissa, exponent] = v.toExponential(digits).split("e");
    return `${trimmed(mantissa)}e${Number(exponent)}`;
  };
  const width = (labels) => Math.max(...labels.map((label) => label.replace("-", "").length));
  let chosen = ticks.map(exponential);
  if (last > -20 && Math.max(...ticks.map(Math.abs)) < 1e20) {
    const digits = ticks.map(plain);
    if (width(digits) <= Math.max(MOST_PLAIN, width(chosen))) chosen = digits;
  }
  return chosen.map((label) => label.replace(/-/g, "−"));
}

// One scale of numbers to pixels: {to(value), ticks}.
function makeScale(low, high, from, to, log, ticks) {
  const map = log ? (v) => Math.log10(v) : (v) => v;
  const [a, b] = [map(low), map(high)];
  const powers = log ? niceTicks(a, b, ticks).filter((p) => Number.isInteger(p)).map((p) => 10 ** p) : null;
  return {
    to: (v) => from + ((map(v) - a) / (b - a || 1)) * (to - from),
    ticks: powers && powers.length > 1 ? powers : log ? [low, high].map((v) => Number(v.toPrecision(2)))
      : niceTicks(low, high, ticks),
  };
}

// Every series of a chart: {label, run, dash, points: bool, steps, values}.
function chartSeries(names, runs) {
  const out = [];
  for (const run of runs) {
    names.forEach((name, place) => {
      const [phase, metric] = name.startsWith("eval:") ? ["eval", name.slice(5)] : ["train", name];
      const table = run.overview.metrics[phase];
      if (!table[metric] || table[metric].every((v) => v == null)) return;
      const colour = runs.length > 1 ? `run-${run.key}` : `series-${place % 4}`;
      out.push({
        label: names.length > 1 || phase === "eval" ? metric : "", run, colour, place,
        points: phase === "eval", steps: table.step, values: table[metric],
      });
    });
  }
  return out;
}

function allCharts(runs) {
  const known = new Set(CHARTS.flatMap(([, names]) => names));
  const groups = { parts: [], rest: [], time: [], memory: [], held: [] };
  const seen = new Set();
  for (const run of runs) {
    for (const name of Object.keys(run.overview.metrics.train)) {
      if (seen.has(name) || known.has(name) || name === "step") continue;
      seen.add(name);
      const group = ["time", "memory"].find((prefix) => name.startsWith(`${prefix}/`));
      groups[group || (name.startsWith("reward/") ? "parts" : "rest")].push(name);
    }
    for (const name of Object.keys(run.overview.metrics.eval)) {
      const key = `eval:${name}`;
      if (!seen.has(key) && !/^(step$|time\/|memory\/)|tokens_per_second/.test(name)) groups.held.push(key);
      seen.add(key);
    }
  }
  const accuracy = groups.held.filter((name) => /@\d+$|greedy/.test(name));
  const charts = [CHARTS[0]];
  if (accuracy.length) charts.push(["Held-out accuracy", accuracy, {}]);
  if (groups.parts.length) charts.push(["Parts of the reward", groups.parts, {}]);
  charts.push(...CHARTS.slice(1));
  if (groups.time.length) charts.push(["Seconds per phase", groups.time, {}]);
  if (groups.memory.length) charts.push(["Memory", groups.memory, {}]);
  const others = groups.held.filter((name) => !accuracy.includes(name));
  const more = [...groups.rest, ...others].map((name) => [name.replace("eval:", "evaluation: "), [name], {}]);
  return { charts, more };
}

class Chart {
  constructor(title, names, options, runs) {
    this.series = chartSeries(names, runs);
    this.runs = runs;
    this.options = options;
    this.title = title;
    if (!this.series.length) return;
    this.steps = [...new Set(this.series.flatMap((s) => s.steps))].sort((a, b) => a - b);
    this.plot = el("svg:svg", { class: "plot", height: CHART.height, tabindex: 0, role: "img",
      "aria-label": `${title} over steps. Arrow keys read values.` });
    this.value = el("div", { class: "chart-value", "aria-live": "polite" });
    this.element = el("figure", { class: "chart" }, el("figcaption", { text: title }), this.value, this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.plot.addEventListener("pointerdown", (event) => this.point(event.offsetX));
    this.plot.addEventListener("pointerleave", () => this.show(null));
    this.plot.addEventListener("blur", () => this.show(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.show(null);
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width || width === this.width) return;
    this.width = width;
    const shown = this.series.flatMap((s) => s.values.filter((v) => Number.isFinite(v)));
    let [low, high] = shown.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const positive = shown.filter((v) => v > 0);
    const log = Boolean(this.options.log) && positive.length > 0 && high / positive.reduce((a, b) => Math.min(a, b)) > 50;
    if (log) low = Math.max(positive.reduce((a, b) => Math.min(a, b)), high * 1e-8);
    // Numbers that differ by rounding alone are one number: ticks between them could not be told apart.
    const size = Math.max(Math.abs(low), Math.abs(high));
    const range = high - low > size * 1e-9 ? high - low : size || 1;
    const pad = log ? 0 : range * 0.06;
    const [first, last] = [this.steps[0], this.steps[this.steps.length - 1]];
    this.y = makeScale(low - pad, high + pad, CHART.height - CHART.bottom, CHART.top, log, 4);
    this.labels = tickLabels(this.y.ticks);
    this.left = Math.max(CHART.left, 14 + LABEL_PIXELS * Math.max(...this.labels.map((text) => text.length)));
    this.x = makeScale(first === last ? first - 1 : first, first === last ? last + 1 : last,
      this.left, width - CHART.right, false, Math.min(7, width / 60));
    this.floor = log ? low : -Infinity;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${CHART.height}`);
    this.cursor = el("svg:g", { class: "cursor" });
    this.plot.replaceChildren(...this.axes(width), ...this.advisories(), ...this.series.map((s) => this.line(s)),
      this.cursor);
  }

  axes(width) {
    const out = [];
    this.y.ticks.forEach((tick, place) => {
      const y = this.y.to(tick);
      out.push(el("svg:line", { class: "grid", x1: this.left, x2: width - CHART.right, y1: y, y2: y }),
        el("svg:text", { class: "tick", x: this.left - 7, y: y + 4, "text-anchor": "end", text: this.labels[place] }));
    });
    for (const tick of this.x.ticks.filter(Number.isInteger)) {
      out.push(el("svg:text", { class: "tick", x: this.x.to(tick), y: CHART.height - 6, "text-anchor": "middle",
        text: String(tick) }));
    }
    return out;
  }

  advisories() {
    const first = new Map();
    for (const run of this.runs) {
      for (const { step, name } of run.overview.advisories) if (!first.has(step)) first.set(step, name);
    }
    return [...first].filter(([step]) => step >= this.steps[0] && step <= this.steps[this.steps.length - 1])
      .slice(0, 200).map(([step, name]) => el("svg:g", { class: "advisory-mark" },
        el("svg:title", { text: `step ${step}: ${name}` }),
        el("svg:line", { x1: this.x.to(step), x2: this.x.to(step), y1: CHART.top, y2: CHART.height - CHART.bottom }),
        el("svg:path", { d: `M${this.x.to(step)},${CHART.top - 1}l-5,-9h10z` })));
  }

  line(series) {
    const [path, dots] = [[], []];
    let pen = "M";
    const every = Math.max(1, Math.floor(series.steps.length / (2 * this.width)));
    series.steps.forEach((step, i) => {
      const value = series.values[i];
      if (!Number.isFinite(value)) pen = "M";
      else if (i % every === 0 || i === series.steps.length - 1) {
        const [x, y] = [this.x.to(step).toFixed(1), this.y.to(Math.max(value, this.floor)).toFixed(1)];
        path.push(`${pen}${x},${y}`);
        if (series.points || series.steps.length === 1) dots.push(el("svg:circle", { cx: x, cy: y, r: 3.5 }));
        pen = "L";
      }
    });
    return el("svg:g", { class: `line ${series.colour} dash-${this.runs.length > 1 ? series.place % 4 : 0}` },
      el("svg:path", { d: path.join("") || "M0,0" }), ...dots);
  }

  point(offset) {
    if (!this.x) return;
    let best = 0;
    this.steps.forEach((step, i) => {
      if (Math.abs(this.x.to(step) - offset) < Math.abs(this.x.to(this.steps[best]) - offset)) best = i;
    });
    this.show(best);
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!move) return;
    event.preventDefault();
    const last = this.steps.length - 1;
    this.show(Math.min(last, Math.max(0, (this.at ?? last) + move)));
  }

  // at: place in steps; null shows the last values.
  show(at) {
    this.at = at;
    const step = this.steps[at ?? this.steps.length - 1];
    const parts = [el("span", { class: "chart-step", text: `step ${step}` })];
    if (this.cursor) this.cursor.replaceChildren();
    if (this.cursor && at != null) {
      const x = this.x.to(step);
      this.cursor.append(el("svg:line", { x1: x, x2: x, y1: CHART.top, y2: CHART.height - CHART.bottom }));
    }
    for (const series of this.series) {
      let place = series.steps.indexOf(step);
      if (place < 0 && at == null) place = series.steps.length - 1;
      if (place < 0 && series.points) continue;
      const value = place < 0 ? null : series.values[place];
      const label = [this.runs.length > 1 ? series.run.key.toUpperCase() : "", series.label].filter(Boolean).join(" ");
      parts.push(el("span", { class: `value ${series.colour}` }, el("i", { class: `dash-${series.place % 4}` }),
        `${label ? `${label} ` : ""}${number(value)}`));
      if (this.cursor && at != null && Number.isFinite(value)) {
        this.cursor.append(el("svg:circle", { class: series.colour, r: 4, cx: this.x.to(step),
          cy: this.y.to(Math.max(value, this.floor)) }));
      }
    }
    this.value.replaceChildren(...parts);
  }
}

function drawWhenSeen(charts) {
  const byPlot = new Map(charts.map((chart) => [chart.plot, chart]));
  const size = new ResizeObserver((entries) => entries.forEach((e) => byPlot.get(e.target).draw()));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      seen.unobserve(entry.target);
      size.observe(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const chart of charts) seen.observe(chart.plot);
}

let drawnCharts = [];

// May be called again with more values: a chart keeps its place and what is read off it.
function buildCharts(runs) {
  const known = new Map(drawnCharts.map((chart) => [chart.title, chart]));
  const make = (list) => list.map((c) => {
    const made = new Chart(...c, runs);
    const old = known.get(made.title);
    if (old && made.series.length) Object.assign(old, { series: made.series, steps: made.steps, width: 0 });
    return old ?? made;
  }).filter((c) => c.series.length);
  const { charts, more } = allCharts(runs);
  const [main, rest] = [make(charts), make(more)];
  for (const [id, list] of [["charts", main], ["more-charts", rest]]) {
    const there = $(id).children;
    if (list.length !== there.length || list.some((c, i) => c.element !== there[i])) {
      $(id).replaceChildren(...list.map((c) => c.element));
    }
  }
  $("more").hidden = !rest.length;
  $("no-metrics").hidden = main.length + rest.length > 0;
  drawnCharts = [...main, ...rest];
  drawWhenSeen(drawnCharts.filter((chart) => !known.has(chart.title)));
  for (const chart of drawnCharts.filter((one) => known.has(one.title))) {
    chart.draw();
    chart.show(chart.at);
  }
}

function buildAdvisories(runs) {
  const rows = runs.flatMap((run) => run.overview.advisories.map((a) => [run, a]));
  $("advisories").hidden = !rows.length;
  $("advisory-count").textContent = rows.length === 1 ? "1 advisory" : `${rows.length} advisories`;
  $("advisory-list").replaceChildren(...rows.slice(0, 500).map(([run, { step, name, message, suggestion }]) =>
    el("li", {}, el("b", { text: String(name).replace(/_/g, " ") }),
      ` · ${runs.length > 1 ? `${run.overview.run}, ` : ""}step ${step}`,
      appendText(el("p"), String(message ?? "")), suggestion ? appendText(el("p", { class: "quiet" }), String(suggestion)) : null)));
}
