// Follows the runs of the page. What is open, filtered or scrolled to stays as it is.

const NEWS_MS = { running: 1000, other: 5000 };
const live = { states: new Map(), drawn: "" };

const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const seen = () => new Promise((done) => {
  if (!document.hidden) done();
  else document.addEventListener("visibilitychange", () => done(), { once: true });
});

function showState() {
  const texts = page.runs.map((run) => {
    const { summary, problem } = live.states.get(run) || {};
    const which = page.runs.length > 1 ? `${run.overview.run}: ` : "";
    if (problem) return `${which}${problem}`;
    if (!summary) return "";
    const steps = summary.step == null ? "" : ` · step ${count(summary.step)}${summary.steps == null ? "" : ` of ${count(summary.steps)}`}`;
    return `${which}${summary.state}${steps}`;
  });
  const first = live.states.get(page.runs[0]) || {};
  $("live-dot").dataset.state = first.problem ? "silent" : first.summary?.state || "";
  const text = texts.filter(Boolean).join(" · ");
  if ($("live-text").textContent !== text) $("live-text").textContent = text;
}

function takeItems(runs) {
  const known = new Map(page.items.map((item) => [item.key, item]));
  const items = makeItems(runs).map((item) => known.get(item.key) ?? item)
    .filter((item) => !item.run.source.gone.has(item.run.overview.samples.file[item.n]));
  const { list } = page;
  if (items.length === page.items.length && items.every((item, i) => item === page.items[i])) return;
  // The same array: list, sample and sliders have it too.
  page.items.splice(0, page.items.length, ...items);
  if ($("with-samples").hidden !== (items.length === 0)) fillLists(runs);
  // The row at the top of the list stays there, whatever comes in above it.
  const top = Math.floor(list.box.scrollTop / ROW_HEIGHT);
  const [first, current] = [list.shown[top], list.shown[list.current]];
  const within = list.box.scrollTop - top * ROW_HEIGHT;
  const kept = list.box.scrollTop > 0;
  list.apply();
  const at = list.shown.indexOf(first);
  if (kept && at >= 0) list.box.scrollTop = at * ROW_HEIGHT + within;
  list.current = Math.max(0, list.shown.indexOf(current));
  list.draw();
}

function redraw(runs) {
  header(runs);
  buildCharts(runs);
  takeItems(runs);
  const rest = JSON.stringify(runs.map(({ overview }) => [overview.advisories, overview.warnings]));
  if (rest === live.drawn) return;
  live.drawn = rest;
  notes(runs);
  const scrolled = $("advisory-list").scrollTop;
  buildAdvisories(runs);
  $("advisory-list").scrollTop = scrolled;
}

async function followRun(run) {
  for (;;) {
    await seen();
    let pause = NEWS_MS.other;
    try {
      const news = await run.source.follow();
      live.states.set(run, { summary: news.summary });
      if (news.again) {
        location.reload(); // it was resumed from an earlier step: what the page shows did not happen
        return;
      }
      if (news.changed) redraw(page.runs);
      pause = news.more ? 0 : NEWS_MS[news.summary.state] || NEWS_MS.other;
    } catch (error) {
      const gone = error.status === 404;
      live.states.set(run, { problem: gone ? "this run is no longer there" : `no answer, trying again (${error.message})` });
      if (gone) {
        showState();
        return;
      }
    }
    showState();
    await wait(pause);
  }
}

async function follow() {
  $("title").before(el("p", { class: "live" }, el("a", { href: "/", text: "All runs" }),
    el("i", { id: "live-dot" }), el("span", { id: "live-text", role: "status" })));
  while (!document.documentElement.dataset.ready) await wait(30);
  document.title = page.runs.map((run) => run.overview.run).join(" and ");
  for (const run of page.runs) followRun(run);
}

follow();
