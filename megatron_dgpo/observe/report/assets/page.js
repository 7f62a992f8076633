// The page: which view is open, and the parts put together.

const page = { runs: [], items: [], list: null, sample: null };

function makeRuns(config) {
  return config.runs.map((run, i) => ({
    key: "ab"[i],
    several: config.runs.length > 1,
    source: config.kind === "embedded" ? new EmbeddedSource("ab"[i]) : new FetchSource(run.base),
  }));
}

function header(runs) {
  $("title").replaceChildren(...runs.flatMap((run, i) => [i ? el("span", { class: "quiet", text: " and " }) : "",
    runs.length > 1 ? el("span", { class: `run-tag run-${run.key}`, text: `${run.key.toUpperCase()} ` }) : "",
    el("bdi", { class: runs.length > 1 ? `run-name run-${run.key}` : "", text: oneLine(run.overview.run) })]));
  const tiles = [];
  for (const run of runs) {
    const { metrics: { train }, settings, samples } = run.overview;
    const ends = (name) => {
      const values = (train[name] || []).filter((v) => v != null);
      return values.length ? [values[0], values[values.length - 1]] : null;
    };
    const span = (name, form) => {
      const found = ends(name);
      return found ? `${form(found[0])} → ${form(found[1])}` : null;
    };
    const credit = settings.credit === "distribution"
      ? `tau ${number(settings.tau)}, kappa ${number(settings.kappa)}` : settings.credit ? "uniform credit" : null;
    tiles.push([run, "Algorithm", settings.algorithm ? [settings.algorithm.toUpperCase(), credit].filter(Boolean).join(" · ") : null],
      [run, "Steps", train.step?.length ? count(train.step[train.step.length - 1]) : null],
      [run, "Reward", span("reward", (v) => number(v, 3))],
      [run, "Effective fraction", span("credit_effective_fraction", percent)],
      [run, "Samples", samples.row.length ? count(samples.row.length) : null]);
  }
  $("tiles").replaceChildren(...runs.map((run) => el("dl", { class: "tiles" },
    ...tiles.filter(([of, , value]) => of === run && value != null).map(([, name, value]) =>
      el("div", { class: runs.length > 1 ? `tile run-${run.key}` : "tile" }, el("dt", { text: name }), el("dd", { text: value }))))));
}

function notes(runs) {
  const lines = [];
  for (const { overview } of runs) {
    const where = runs.length > 1 ? `${overview.run}: ` : "";
    for (const warning of overview.warnings) lines.push(`${where}Left out: ${warning}`);
    if (overview.left_out?.samples) {
      const steps = Object.entries(overview.left_out.steps).map(([step, n]) => `step ${step}: ${n}`).join(", ");
      lines.push(`${where}${plural(overview.left_out.samples, "sample")} did not fit into this file (${steps}). Build it with a larger --max-mb to have them.`);
    }
    if (overview.precision) lines.push(`${where}Numbers in this file: ${overview.precision}`);
  }
  $("notes").replaceChildren(...lines.map((line) => appendText(el("li"), line)));
  $("notes").hidden = !lines.length;
  $("warned").hidden = !runs.some(({ overview }) => overview.warnings.length || overview.left_out?.samples);
}

function route() {
  const hash = decodeURIComponent(location.hash.slice(1));
  const key = hash.startsWith("sample-") ? hash.slice(7) : null;
  const view = key || hash === "samples" ? "samples" : "curves";
  $("curves").hidden = view !== "curves";
  $("samples").hidden = view !== "samples";
  for (const name of ["curves", "samples"]) {
    if (name === view) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  const item = key ? page.items.find((one) => one.key === key) : null;
  document.body.classList.toggle("has-open", Boolean(item));
  $("tip").hidden = true;
  if (item) {
    page.list.select(item.key);
    page.sample.show(item);
  } else if (view === "samples") page.list.draw();
}

function fillLists(runs) {
  const empty = page.items.length === 0;
  $("no-samples").hidden = !empty;
  $("with-samples").hidden = empty;
  $("which-run-field").hidden = runs.length < 2;
  $("which-run").replaceChildren(el("option", { value: "", text: "both" }),
    ...runs.map((run) => el("option", { value: run.key, text: run.overview.run })));
}

async function start() {
  const runs = makeRuns(JSON.parse($("source").textContent));
  try {
    for (const run of runs) run.overview = await run.source.overview();
  } catch (error) {
    $("loading").textContent = `This report cannot be read: ${error.message}`;
    return;
  }
  page.runs = runs;
  page.items = makeItems(runs);
  header(runs);
  notes(runs);
  buildAdvisories(runs);
  buildCharts(runs);
  fillLists(runs);
  page.list = new SampleList(page.items, (item) => {
    if (location.hash === `#sample-${item.key}`) route();
    else location.hash = `sample-${item.key}`;
  });
  page.sample = new SampleView(page.items);
  window.addEventListener("hashchange", route);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("tip").hidden) $("tip").hidden = true;
  });
  document.addEventListener("scroll", placeTip, { capture: true, passive: true });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".tok")) $("tip").hidden = true;
  });
  $("loading").hidden = true;
  $("content").hidden = false;
  route();
  document.documentElement.dataset.ready = "yes";
}

// For the browser's console: report.open() has the numbers of the response that is open.
window.report = {
  page,
  open: () => {
    const pane = page.sample?.main;
    return pane && {
      ...pane.item, texts: pane.data.texts, ids: pane.data.ids, numbers: pane.data.numbers,
      weights: pane.weights, trained: pane.trained,
    };
  },
};

start();
