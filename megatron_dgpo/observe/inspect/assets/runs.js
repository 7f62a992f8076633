// The list of runs.

const LIST_MS = 2000;
const rows = new Map(); // name -> row
const chosen = new Set();

function ago(seconds) {
  const units = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];
  const [size, word] = units.find(([size]) => seconds >= size) || [1, "second"];
  return `${plural(Math.max(0, Math.floor(seconds / size)), word)} ago`;
}

const runHref = (name) => `/run?${new URLSearchParams({ run: name })}`;

function makeRow(name) {
  const cell = (cls) => el("td", { class: cls });
  const box = el("input", { type: "checkbox", "aria-label": `Compare ${oneLine(name)}`, onchange: () => {
    if (box.checked) chosen.add(name);
    else chosen.delete(name);
    showCompare();
  } });
  const cells = { state: cell("run-state"), step: cell("run-step"), reward: cell("num"), held: cell("num"), written: cell("num quiet") };
  const link = el("a", { href: runHref(name) }, el("bdi", { text: oneLine(name) }));
  const problem = el("p", { class: "problem", hidden: true });
  const element = el("tr", {}, el("td", {}, box), el("th", { scope: "row" }, link, problem), ...Object.values(cells));
  return { element, cells, problem };
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function fill(row, run, now) {
  const { cells, problem } = row;
  setText(cells.state, run.state);
  cells.state.dataset.state = run.state;
  setText(cells.step, run.step == null ? "–" : run.steps == null ? count(run.step) : `${count(run.step)} / ${count(run.steps)}`);
  setText(cells.reward, number(run.reward, 3));
  setText(cells.held, run.evaluation
    ? Object.entries(run.evaluation).map(([name, value]) => `${name} ${number(value, 3)}`).join(", ") : "–");
  setText(cells.written, ago(Math.max(0, now - run.updated)));
  setText(problem, run.problem || "");
  problem.hidden = !run.problem;
}

function showCompare() {
  const names = [...chosen].filter((name) => rows.has(name));
  const link = $("compare");
  if (names.length === 2) {
    link.href = `/run?${new URLSearchParams({ run: names[0], compare: names[1] })}`;
    link.removeAttribute("aria-disabled");
  } else {
    link.removeAttribute("href");
    link.setAttribute("aria-disabled", "true");
  }
}

function show(answer) {
  const wanted = $("filter").value.toLowerCase();
  const found = answer.runs.filter((run) => run.name.toLowerCase().includes(wanted));
  for (const name of rows.keys()) if (!answer.runs.some((run) => run.name === name)) rows.delete(name);
  for (const run of found) {
    if (!rows.has(run.name)) rows.set(run.name, makeRow(run.name));
    fill(rows.get(run.name), run, Date.now() / 1000);
  }
  const elements = found.map((run) => rows.get(run.name).element);
  const body = $("runs");
  if (elements.length !== body.children.length || elements.some((one, i) => one !== body.children[i])) {
    const focused = document.activeElement;
    body.replaceChildren(...elements);
    if (body.contains(focused)) focused.focus();
  }
  const empty = answer.runs.length === 0;
  $("state").hidden = !empty;
  setText($("state"), `No run is below ${answer.folder} yet: a run is a folder with config.toml and metrics.jsonl.`);
  $("content").hidden = empty;
  setText($("note"), [
    found.length === answer.runs.length ? `${plural(found.length, "run")} in ${answer.folder}`
      : `${count(found.length)} of ${plural(answer.runs.length, "run")} in ${answer.folder}`,
    answer.cut ? "; the folder is too large to look through, and there may be more" : "",
  ].join(""));
  showCompare();
}

async function list() {
  let last = null;
  $("filter").addEventListener("input", () => last && show(last));
  for (;;) {
    if (!document.hidden) {
      try {
        const answer = await fetch("/api/runs");
        if (!answer.ok) throw new Error((await answer.json()).error);
        last = await answer.json();
        show(last);
      } catch (error) {
        setText($("note"), `No answer from the inspector, trying again (${error.message})`);
        if (!last) setText($("state"), $("note").textContent);
      }
      document.documentElement.dataset.ready = "yes";
    }
    await new Promise((done) => setTimeout(done, LIST_MS));
  }
}

list();
