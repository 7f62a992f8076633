// A run as the inspector's server tells it. Takes the place of the report's source.js.

const ask = async (path, parameters) => {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(parameters)}`);
  if (answer.ok) return answer;
  let why = "";
  try {
    why = (await answer.json()).error;
  } catch {
    // not an answer of this server
  }
  throw Object.assign(new Error(why || `${answer.status} ${answer.statusText}`), { status: answer.status });
};

// The overview's arrays only ever grow, so that a sample's place n stays its own; `gone` has the places in
// `files` whose file was removed or written again.
class FetchSource {
  constructor(name) {
    this.name = name;
    this.gone = new Set();
    this.damaged = new Map(); // "step-replica" -> warning
    this.unread = new Set(); // lines of metrics or advisories that are left out
  }

  async overview() {
    this.last = await (await ask("overview", { run: this.name })).json();
    const { metrics, advisories, files, digest } = this.last.live;
    this.cursors = { metrics, advisories, digest };
    this.known = new Map(files.map(([step, replica, stamp]) => [`${step}-${replica}`, stamp]));
    this.warnings = this.last.warnings;
    this.prompts = new Map(this.last.prompts.map((prompt, i) => [JSON.stringify([prompt.id, prompt.text]), i]));
    return this.last;
  }

  async sample(n) {
    const file = this.last.files[this.last.samples.file[n]];
    const answer = await ask("sample", {
      run: this.name, step: file.step, replica: file.replica, row: this.last.samples.row[n],
    });
    return decodeSample(new Uint8Array(await answer.arrayBuffer()), null);
  }

  // Takes in what came since; returns {summary, changed, again}. again: a resumed run has dropped rows.
  async follow() {
    const news = await (await ask("news", { run: this.name, ...this.cursors })).json();
    if (news.metrics.restart || news.advisories.restart) return { summary: news.summary, changed: false, again: true };
    const { metrics, advisories, warnings } = this.last;
    const before = JSON.stringify([this.warnings, [...this.damaged], [...this.unread]]);
    for (const row of news.metrics.rows) addRow(metrics, row);
    const said = new Set(advisories.map((row) => JSON.stringify(row)));
    advisories.push(...news.advisories.rows.filter((row) => !said.has(JSON.stringify(row))));
    for (const problem of [...news.metrics.problems, ...news.advisories.problems]) this.unread.add(problem);
    const changed = news.files ? await this.takeFiles(news.files) : false;
    this.cursors = { metrics: news.metrics.cursor, advisories: news.advisories.cursor, digest: news.digest };
    warnings.splice(0, warnings.length, ...this.warnings, ...this.damaged.values(), ...this.unread);
    const warned = before !== JSON.stringify([this.warnings, [...this.damaged], [...this.unread]]);
    return {
      summary: news.summary, again: false, more: news.metrics.more || news.advisories.more,
      changed: news.metrics.rows.length > 0 || news.advisories.rows.length > 0 || changed || warned,
    };
  }

  // files: [step, replica, stamp] of all that are there now. Whether anything changed.
  async takeFiles(files) {
    const now = new Map(files.map(([step, replica, stamp]) => [`${step}-${replica}`, stamp]));
    const removed = [...this.known.keys()].filter((place) => now.get(place) !== this.known.get(place));
    const wanted = [...now.keys()].filter((place) => now.get(place) !== this.known.get(place));
    const found = { files: [], warnings: [] };
    for (let i = 0; i < wanted.length; i += 32) {
      const part = await (await ask("files", { run: this.name, want: wanted.slice(i, i + 32).join(",") })).json();
      found.files.push(...part.files);
      found.warnings.push(...part.warnings);
    }
    for (const place of [...removed, ...wanted]) this.drop(place);
    for (const file of found.files) this.add(file);
    for (const { step, replica, text } of found.warnings) this.damaged.set(`${step}-${replica}`, text);
    this.known = now;
    return removed.length + wanted.length > 0;
  }

  drop(place) {
    this.last.files.forEach((file, i) => {
      if (`${file.step}-${file.replica}` === place) this.gone.add(i);
    });
    this.damaged.delete(place);
    const [step, replica] = place.split("-");
    const name = `step_${step.padStart(6, "0")}-replica${replica}.parquet`;
    this.warnings = this.warnings.filter((warning) => !warning.includes(name));
  }

  add({ step, replica, settings, prompts, samples }) {
    const { last } = this;
    const place = last.files.push({ step, replica, settings }) - 1;
    for (const prompt of prompts) {
      const key = JSON.stringify([prompt.id, prompt.text]);
      if (!this.prompts.has(key)) this.prompts.set(key, last.prompts.push(prompt) - 1);
      last.samples.file.push(place);
      last.samples.prompt.push(this.prompts.get(key));
    }
    for (const [name, values] of Object.entries(samples)) last.samples[name].push(...values);
    if (place === 0 || step >= Math.max(...last.files.map((file) => file.step))) last.settings = settings;
  }
}

// One row of metrics.jsonl into the columns of its phase. A step that is there already came twice.
function addRow(metrics, row) {
  const table = metrics[row.phase];
  if (!table) return;
  table.step ??= [];
  const length = table.step.length;
  if (length && row.step <= table.step[length - 1]) return;
  for (const name of Object.keys(row)) {
    if (name !== "phase") table[name] ??= new Array(length).fill(null);
  }
  for (const [name, column] of Object.entries(table)) column.push(row[name] ?? null);
}
