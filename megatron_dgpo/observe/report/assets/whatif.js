// What another tau, kappa or entropy normalisation would have done, without generating again.

const TAU = { low: 1e-3, high: 1e2 }; // of the slider; the number beside it takes any above 0

class WhatIf {
  // changed(settings or null): the sliders moved, or stand as trained.
  constructor(items, changed) {
    this.items = items;
    this.changed = changed;
    this.pass = 0; // number of the pass over all samples under way
    const ids = ["tau", "kappa"];
    for (const id of ids) {
      $(`${id}-slider`).addEventListener("input", () => {
        const at = Number($(`${id}-slider`).value);
        $(id).value = id === "tau" ? String(Number((10 ** at).toPrecision(3))) : String(at);
        this.update();
      });
      $(id).addEventListener("input", () => this.update());
    }
    $("normalization").addEventListener("input", () => this.update());
    $("as-trained").addEventListener("click", () => this.reset());
  }

  // A sample opens: the sliders keep what the user chose.
  open(item, data) {
    this.item = item;
    const { settings } = item;
    this.possible = Boolean(data.numbers.distance && data.numbers.entropy && settings.tau != null);
    $("what-if").hidden = !this.possible;
    $("no-what-if").hidden = this.possible;
    $("no-what-if").textContent = settings.credit === "uniform"
      ? `No sliders: ${settings.algorithm || "this run"} gives every token of a response the same credit, and no distance was recorded to weigh it by.`
      : "No sliders: the distances that this response's weights come from were not recorded.";
    if (!this.possible) return;
    if (!this.settings) this.fill(settings);
    this.data = data;
  }

  fill(settings) {
    $("tau").value = settings.tau;
    $("kappa").value = settings.kappa;
    $("normalization").value = settings.entropy_normalization;
    this.slide();
  }

  slide() {
    $("tau-slider").value = Math.log10(Number($("tau").value) || 1);
    $("kappa-slider").value = Number($("kappa").value) || 0;
  }

  reset() {
    this.settings = null;
    this.fill(this.item.settings);
    this.mark();
    this.changed(null);
  }

  update() {
    const [tau, kappa] = [Number($("tau").value), Number($("kappa").value)];
    const wrong = !(tau > 0 && Number.isFinite(tau)) || $("tau").value === "" ? "tau"
      : !(kappa >= 0 && Number.isFinite(kappa)) || $("kappa").value === "" ? "kappa" : null;
    for (const id of ["tau", "kappa"]) $(id).setAttribute("aria-invalid", String(id === wrong));
    if (wrong) return;
    this.slide();
    const { settings } = this.item;
    const chosen = { tau, kappa, entropy_normalization: $("normalization").value };
    const same = Object.entries(chosen).every(([name, value]) => settings[name] === value);
    this.settings = same ? null : chosen;
    this.mark();
    this.changed(this.settings);
  }

  mark() {
    $("as-trained").disabled = !this.settings;
  }

  // trained, moved: weights of the open response.
  show(trained, moved) {
    if (!this.possible) return;
    const [before, after] = [creditSummary(trained), creditSummary(moved)];
    for (const [name, form] of [["effective", percent], ["top1", percent], ["top10", percent], ["max", number]]) {
      $(`${name}-trained`).textContent = form(before[name]);
      $(`${name}-chosen`).textContent = form(after[name]);
    }
    drawCurve(trained, moved);
    const used = { ...this.item.settings, ...this.settings };
    const { distance, entropy } = this.data.numbers;
    const bound = creditErrorBound(distance, entropy, used, this.data.halfSteps);
    $("bound").hidden = !bound;
    $("bound").textContent = `Distance and entropy are rounded to fit this file. With these settings a weight of this `
      + `response is off by at most ${bound > 1 ? "more than its own size" : `${number(100 * bound, 2)}% of itself`}.`;
    this.overall();
  }

  // The effect on all samples of the run, in the background.
  async overall() {
    const pass = ++this.pass;
    const { settings } = this;
    const items = this.items.filter((one) => one.run === this.item.run && one.effective != null);
    const mean = items.reduce((sum, one) => sum + one.effective, 0) / items.length;
    $("all-trained").textContent = percent(mean);
    $("all-label").textContent = `Mean effective fraction, ${plural(items.length, "sample")}`;
    $("all-chosen").dataset.settled = settings ? "" : "yes";
    if (!settings) {
      $("all-chosen").textContent = percent(mean);
      return;
    }
    const key = JSON.stringify([this.item.run.key, items.length, settings]);
    if (this.known?.key === key) {
      $("all-chosen").textContent = percent(this.known.mean);
      $("all-chosen").dataset.settled = "yes";
      return;
    }
    $("all-chosen").textContent = "…";
    await new Promise((done) => setTimeout(done, 250)); // until the sliders rest
    let [sum, drawn, done, unread] = [0, performance.now(), 0, 0];
    for (const one of items) {
      if (pass !== this.pass) return;
      let numbers;
      try {
        ({ numbers } = await one.run.source.sample(one.n));
      } catch {
        unread++;
        continue;
      }
      sum += numbers.distance && numbers.entropy && one.settings.tau != null
        ? effectiveFraction(creditWeights(numbers.distance, numbers.entropy, { ...one.settings, ...settings }))
        : one.effective;
      done++;
      if (performance.now() - drawn > 200 && pass === this.pass) {
        $("all-chosen").textContent = `${percent(sum / done)} (${count(done)} of ${count(items.length)})`;
        await breathe();
        drawn = performance.now();
      }
    }
    if (pass !== this.pass) return;
    if (!unread) this.known = { key, mean: sum / items.length };
    $("all-chosen").textContent = (done ? percent(sum / done) : "–") + (unread ? ` (${count(unread)} could not be read)` : "");
    $("all-chosen").dataset.settled = "yes";
  }
}

// Share of the credit (up) on the heaviest share of the tokens (right); the diagonal is uniform credit.
function drawCurve(trained, moved) {
  const [width, height, edge] = [220, 150, 26];
  const path = (weights) => {
    const sorted = Float64Array.from(weights).sort().reverse();
    const total = sumOf(sorted) || 1;
    const points = [`M${edge},${height - edge}`];
    let sum = 0;
    const every = Math.max(1, Math.floor(sorted.length / 200));
    for (let i = 0; i < sorted.length; i++) {
      sum += sorted[i];
      if ((i + 1) % every === 0 || i === sorted.length - 1) {
        points.push(`L${(edge + ((i + 1) / sorted.length) * (width - edge - 6)).toFixed(1)},`
          + `${(height - edge - (sum / total) * (height - edge - 6)).toFixed(1)}`);
      }
    }
    return points.join("");
  };
  const tick = (x, y, text, anchor) => el("svg:text", { class: "tick", x, y, "text-anchor": anchor, text });
  $("curve").replaceChildren(
    el("svg:path", { class: "grid", d: `M${edge},6V${height - edge}H${width - 6}` }),
    el("svg:path", { class: "grid diagonal", d: `M${edge},${height - edge}L${width - 6},6` }),
    el("svg:path", { class: "curve-trained", d: path(trained) }),
    el("svg:path", { class: "curve-chosen", d: path(moved) }),
    tick(edge, height - 8, "heaviest tokens", "start"), tick(width - 6, height - 8, "all", "end"),
    tick(edge - 4, 14, "all", "end"), tick(edge - 4, height - edge, "0", "end"));
}
