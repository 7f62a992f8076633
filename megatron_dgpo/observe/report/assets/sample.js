// One response: prompt, facts, heat panes, what-if, steps.

class SampleView {
  constructor(items) {
    this.items = items;
    this.opening = 0;
    this.whatIf = new WhatIf(items, (settings) => this.recompute(settings));
    for (const input of document.querySelectorAll("input[name=mode]")) {
      input.addEventListener("change", () => {
        this.mode = input.value;
        this.render();
      });
    }
    this.mode = document.querySelector("input[name=mode]:checked").value;
    $("beside").addEventListener("change", () => {
      this.chosenBeside = $("beside").value;
      this.rebuild();
    });
    for (const input of document.querySelectorAll("input[name=steps]")) {
      input.addEventListener("change", () => {
        this.stepsChosen = true;
        this.drawSteps();
      });
    }
  }

  async show(item) {
    const opening = ++this.opening;
    $("detail-error").hidden = true;
    let data;
    try {
      data = await item.run.source.sample(item.n);
    } catch (error) {
      if (opening !== this.opening) return;
      $("detail-error").hidden = false;
      $("detail-error").textContent = `This sample cannot be opened: ${error.message}`;
      $("sample").hidden = true;
      return;
    }
    if (opening !== this.opening) return;
    Object.assign(this, { item, data });
    $("pick").hidden = true;
    $("sample").hidden = false;
    this.facts();
    this.besideChoices();
    this.whatIf.open(item, data);
    if (!this.stepsChosen) { // a response of one sentence may be worked in many steps
      const { sentences, arithmetic } = data.steps;
      const kind = sentences.length < 2 && arithmetic.length > 1 ? "arithmetic" : "sentences";
      document.querySelector(`input[name=steps][value=${kind}]`).checked = true;
    }
    await this.rebuild();
  }

  facts() {
    const { item, data } = this;
    const { settings } = item;
    const verdict = item.right == null ? "no reward: scoring failed" : item.right ? "right" : "wrong";
    $("sample-title").textContent = `Step ${item.step}, sample ${item.index}`;
    $("sample-verdict").textContent = verdict;
    $("sample-verdict").className = `badge ${item.right == null ? "failed" : item.right ? "right" : "wrong"}`;
    $("sample-run").textContent = `${item.run.overview.run} · prompt ${oneLine(item.prompt.id || "")}`;
    const facts = [
      ["Reward", number(item.reward)], ...Object.entries(data.reward_parts).map(([name, value]) => [`· ${name}`, number(value)]),
      ["Advantage", number(item.advantage)], ["Tokens", `${count(item.length)} after ${count(item.prompt.tokens ?? 0)}`],
      ["Finished by", { stop: "stop token", length: "length limit" }[item.finish] || item.finish],
      ["Weight version", data.versions.map(([v, a, b]) => (data.versions.length > 1 ? `${v} (tokens ${a + 1}–${b})` : v)).join(", ") || "–"],
      ["Credit", settings.credit === "distribution"
        ? `tau ${number(settings.tau)}, kappa ${number(settings.kappa)}` : `${settings.credit || "–"}`],
    ];
    $("facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), appendText(el("dd"), String(value)))));
    appendText(clear("prompt"), item.prompt.text || "");
    const answers = [["Gold answer", item.prompt.answer], ["Answer taken", data.extracted]];
    $("answers").replaceChildren(...answers.map(([name, value]) => el("div", {}, el("dt", { text: name }),
      value == null ? el("dd", { class: "quiet", text: "none" }) : appendText(el("dd"), value))));
  }

  // Other responses to the prompt, of all runs; the other run's first, of the nearest step.
  besideChoices() {
    const { item } = this;
    const same = this.items.filter((one) => one !== item && one.prompt.text === item.prompt.text)
      .sort((a, b) => (a.run === item.run) - (b.run === item.run)
        || Math.abs(a.step - item.step) - Math.abs(b.step - item.step) || a.order - b.order).slice(0, 200);
    const name = (one) => `${item.run.several ? `${one.run.overview.run}, ` : ""}step ${one.step}, sample ${one.index}`
      + ` (${one.right == null ? "failed" : one.right ? "right" : "wrong"})`;
    $("beside").replaceChildren(el("option", { value: "", text: "nothing" }),
      el("option", { value: "uniform", text: "GRPO's uniform credit" }),
      same.length ? el("optgroup", { label: "Same prompt" }, ...same.map((one) => el("option", { value: one.key, text: name(one) }))) : "");
    const other = same.find((one) => one.run !== item.run);
    const keep = this.chosenBeside === "" || this.chosenBeside === "uniform" ? this.chosenBeside : null;
    $("beside").value = keep ?? (other ? other.key : item.settings.credit === "distribution" ? "uniform" : "");
  }

  async rebuild() {
    const { item, data, opening } = this;
    const beside = $("beside").value;
    const title = item.run.several ? `${item.run.overview.run}, step ${item.step}` : (item.settings.algorithm || "Trained").toUpperCase();
    const panes = [new HeatPane(item, data, { title })];
    if (beside === "uniform") panes.unshift(new HeatPane(item, data, { uniform: true, title: "GRPO" }));
    else if (beside) {
      const other = this.items.find((one) => one.key === beside);
      // A sample that is there no more, as a run under way may thin its log, has nothing beside it.
      const theirs = await other.run.source.sample(other.n).catch(() => null);
      if (opening !== this.opening || beside !== $("beside").value) return;
      if (theirs) panes.push(new HeatPane(other, theirs, { title: item.run.several ? `${other.run.overview.run}, step ${other.step}` : `Step ${other.step}, sample ${other.index}` }));
    }
    this.panes = panes;
    this.main = panes.find((pane) => !pane.uniform);
    $("panes").replaceChildren(...panes.map((pane) => pane.element));
    $("panes").classList.toggle("two", panes.length > 1);
    $("tip").hidden = true;
    if (panes.length > 1 && panes[0].item === panes[1].item) scrollTogether(panes.map((pane) => pane.box));
    this.recompute(this.whatIf.settings);
  }

  recompute(settings) {
    if (!this.panes) return;
    for (const pane of this.panes) pane.setWeights(settings);
    this.whatIf.show(this.main.trained, this.main.weights);
    this.render();
    this.drawSteps();
  }

  render() {
    if (!this.panes) return;
    const scale = heatScale(this.mode, this.panes);
    for (const pane of this.panes) pane.colour(this.mode, scale);
    $("legend-bar").classList.toggle("signed", scale.signed);
    $("legend-ticks").replaceChildren(...scale.ticks.map((text) => el("span", { text })));
    $("legend-note").textContent = MODES[this.mode].values(this.main) ? scale.note : "not recorded in this run";
  }

  drawSteps() {
    if (!this.main) return;
    const kind = document.querySelector("input[name=steps]:checked").value;
    const { weights, data } = this.main;
    const total = sumOf(weights) || 1;
    let start = 0;
    const steps = (this.data.steps[kind] || []).map((tokens) => {
      const end = start + tokens;
      const step = { start, end, share: sumOf(weights.subarray(start, end)) / total, even: (end - start) / data.count };
      start = end;
      return step;
    });
    const top = Math.max(1e-9, ...steps.flatMap((s) => [s.share, s.even]));
    $("step-count").textContent = plural(steps.length, kind === "sentences" ? "sentence" : "step");
    $("step-list").replaceChildren(...steps.slice(0, 1000).map((step, i) => {
      const [bar, tick] = [el("i", { class: "bar" }), el("i", { class: "even" })];
      bar.style.width = `${(100 * step.share) / top}%`;
      tick.style.left = `${(100 * step.even) / top}%`;
      const text = oneLine(data.texts.slice(step.start, step.end).join("")).slice(0, 160);
      const mark = () => this.main.mark(step.start, step.end);
      const unmark = () => this.main.mark(0, 0);
      return el("li", { tabindex: 0, onpointerenter: mark, onpointerleave: unmark, onfocus: mark, onblur: unmark,
        onclick: () => this.main.spans[step.start]?.scrollIntoView({ block: "nearest" }) },
        el("span", { class: "step-no", text: String(i + 1) }), el("bdi", { class: "step-text", text }),
        el("span", { class: "step-share", "data-share": step.share, text: percent(step.share) }),
        el("span", { class: "step-times quiet", title: "share of credit over share of tokens", text: `×${number(step.share / step.even, 3)}` }),
        el("span", { class: "track" }, bar, tick));
    }));
  }
}

// The same response twice: what is read on one side is in view on the other.
function scrollTogether(boxes) {
  boxes.forEach((box, i) => box.addEventListener("scroll", () => {
    const other = boxes[1 - i];
    if (Math.abs(other.scrollTop - box.scrollTop) > 1) other.scrollTop = box.scrollTop;
  }, { passive: true }));
}

function clear(id) {
  $(id).replaceChildren();
  return $(id);
}
