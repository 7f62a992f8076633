// The list of samples: only the rows in view exist.

const ROW_HEIGHT = 68; // px, as in page.css

const SORTS = {
  step: (a, b) => a.step - b.step || a.order - b.order,
  newest: (a, b) => b.step - a.step || a.order - b.order,
  best: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity) || b.advantage - a.advantage || a.order - b.order,
  worst: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity) || a.advantage - b.advantage || a.order - b.order,
  concentrated: (a, b) => (a.effective ?? 2) - (b.effective ?? 2) || a.order - b.order,
  longest: (a, b) => b.length - a.length || a.order - b.order,
};

// All responses of the runs as {key, run, n, step, ...}.
function makeItems(runs) {
  const items = [];
  for (const run of runs) {
    const s = run.overview.samples;
    for (let n = 0; n < s.row.length; n++) {
      items.push({
        key: `${run.key}${n}`, run, n, order: items.length, step: run.overview.files[s.file[n]].step,
        settings: run.overview.files[s.file[n]].settings, prompt: run.overview.prompts[s.prompt[n]],
        index: s.index[n], reward: s.reward[n], right: s.right[n], advantage: s.advantage[n], length: s.length[n],
        finish: s.finish_reason[n], preview: s.preview[n], effective: s.effective_fraction[n],
        max: s.max_weight[n], top1: s.top1_share[n], top10: s.top10_share[n], text: null,
      });
    }
  }
  return items;
}

class SampleList {
  constructor(items, open) {
    this.items = items;
    this.open = open;
    this.shown = [];
    this.current = 0;
    this.search = 0; // number of the search under way
    this.box = $("list");
    this.inner = $("list-inner");
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.box.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.box);
    for (const control of $("filters").querySelectorAll("input, select")) {
      control.addEventListener("input", () => this.apply());
    }
    $("clear").addEventListener("click", () => {
      for (const input of $("filters").querySelectorAll("input")) input.value = "";
      for (const select of $("filters").querySelectorAll(".filter select")) select.value = "";
      this.apply();
    });
    this.apply();
  }

  // What the filters let through, the search aside.
  filtered() {
    const bound = (id, other) => ($(id).value === "" ? other : Number($(id).value));
    const ranges = ["reward", "step", "length"].map((name) => [
      name, bound(`${name}-from`, -Infinity), bound(`${name}-to`, Infinity)]);
    const [verdict, run] = [$("verdict").value, $("which-run").value];
    return this.items.filter((item) =>
      ranges.every(([name, from, to]) =>
        (from === -Infinity && to === Infinity) || (item[name] != null && item[name] >= from && item[name] <= to))
      && (!verdict || (verdict === "right") === Boolean(item.right))
      && (!run || item.run.key === run));
  }

  async apply() {
    const search = ++this.search;
    const wanted = $("search").value.toLowerCase();
    const found = this.filtered().sort(SORTS[$("sort").value]);
    const known = (item) => (item.prompt.text || "").toLowerCase().includes(wanted)
      || (item.text ?? item.preview).toLowerCase().includes(wanted);
    if (!wanted || found.every((item) => item.text != null)) {
      this.set(wanted ? found.filter(known) : found, "");
      return;
    }
    // Texts are in compressed parts: what is known is shown, the rest follows.
    let shown = new Set(found.filter(known));
    this.set([...shown], "searching");
    let [drawn, unread] = [performance.now(), 0];
    for (let i = 0; i < found.length; i++) {
      const item = found[i];
      try {
        item.text ??= (await item.run.source.sample(item.n)).texts.join("");
      } catch {
        unread++; // a log that is thinned out meanwhile, or a file that is cut off: its beginning is known
      }
      if (search !== this.search) return;
      if (known(item)) shown.add(item);
      if (performance.now() - drawn > 300) {
        this.set(found.filter((one) => shown.has(one)), `searching ${count(i + 1)} of ${count(found.length)}`);
        await breathe();
        drawn = performance.now();
      }
    }
    this.set(found.filter((one) => shown.has(one)), "", unread);
  }

  set(shown, note, unread = 0) {
    this.shown = shown;
    this.current = Math.max(0, shown.findIndex((item) => item.key === this.opened));
    $("count").textContent = note || (shown.length === this.items.length
      ? plural(shown.length, "sample") : `${count(shown.length)} of ${plural(this.items.length, "sample")}`)
      + (unread ? `, ${count(unread)} could not be read` : "");
    $("count").dataset.settled = note ? "" : "yes";
    $("none-found").hidden = shown.length > 0 || Boolean(note) || !this.items.length;
    this.inner.style.height = `${shown.length * ROW_HEIGHT}px`;
    this.drawn = null;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(this.shown.length, first + Math.ceil(this.box.clientHeight / ROW_HEIGHT) + 9);
    const state = `${first}-${last}-${this.current}-${this.opened}`;
    if (state === this.drawn) return;
    this.drawn = state;
    this.inner.replaceChildren(...this.shown.slice(first, last).map((item, i) => this.row(item, first + i)));
    if (this.shown.length) this.box.setAttribute("aria-activedescendant", `row-${this.current}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(item, place) {
    const verdict = item.right == null ? ["?", "no reward", "failed"] : item.right ? ["✓", "right", "right"]
      : ["✗", "wrong", "wrong"];
    const bar = el("span", { class: "eff" }, el("i"));
    bar.firstChild.style.width = `${100 * (item.effective ?? 1)}%`;
    const row = el("div", { class: "row", role: "option", id: `row-${place}`, "aria-posinset": place + 1,
      "aria-setsize": this.shown.length, "aria-selected": String(item.key === this.opened),
      onclick: () => this.choose(place) },
      el("div", { class: "row-head" },
        el("span", { class: `verdict ${verdict[2]}`, title: verdict[1], text: verdict[0] }),
        el("span", { class: "row-reward", title: "reward", text: number(item.reward, 3) }),
        item.run.several ? el("span", { class: `run-tag run-${item.run.key}`, text: item.run.key.toUpperCase() }) : null,
        el("span", { text: `step ${item.step}` }), el("span", { text: `${count(item.length)} tok` }),
        el("span", { class: "row-eff", title: "effective token fraction" }, bar, percent(item.effective))),
      el("div", { class: "row-text" }, el("bdi", { class: "row-prompt", text: oneLine(item.prompt.text || "").slice(0, 80) }),
        el("bdi", { class: "row-preview", text: oneLine(item.preview) })));
    if (place === this.current) row.classList.add("current");
    row.style.top = `${place * ROW_HEIGHT}px`;
    return row;
  }

  choose(place) {
    this.current = place;
    this.open(this.shown[place]);
  }

  select(key) {
    this.opened = key;
    const place = this.shown.findIndex((item) => item.key === key);
    if (place >= 0) this.moveTo(place);
    this.draw();
  }

  moveTo(place) {
    this.current = Math.min(this.shown.length - 1, Math.max(0, place));
    const top = this.current * ROW_HEIGHT;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW_HEIGHT > this.box.scrollTop + this.box.clientHeight) {
      this.box.scrollTop = top + ROW_HEIGHT - this.box.clientHeight;
    }
    this.draw();
  }

  key(event) {
    const page = Math.floor(this.box.clientHeight / ROW_HEIGHT);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 }[event.key];
    if (move) this.moveTo(this.current + move);
    else if (event.key === "Enter" && this.shown.length) this.choose(this.current);
    else return;
    event.preventDefault();
  }
}
