// The response's tokens, coloured by a number.

const MODES = {
  weight: { label: "Weight", values: (pane) => pane.weights },
  distance: { label: "Distance", values: (pane) => pane.data.numbers.distance || pane.data.numbers.hellinger },
  entropy: { label: "Entropy", values: (pane) => pane.data.numbers.entropy },
  advantage: { label: "Advantage", values: (pane) => pane.weights.map((w, i) => w * pane.advantages[i]) },
};

const WEIGHT_RANGES = [1.1, 1.5, 2, 4, 8, 16, 64, 256, 1024];

// How a mode's numbers become colours on all panes: {shade(value) in [-1, 1], ticks, note}.
function heatScale(mode, panes) {
  const all = panes.flatMap((pane) => [MODES[mode].values(pane) || []]);
  const top = Math.max(0, ...all.map((values) => largest(values.map(Math.abs)))) || 0;
  if (mode === "weight") {
    const range = WEIGHT_RANGES.find((r) => r >= top) || top;
    return { shade: (w) => Math.max(-1, Math.log(w) / Math.log(range)), signed: true,
      ticks: [`${number(1 / range, 2)}`, "1", `${number(range, 4)}`], note: "logarithmic; 1 is uniform credit" };
  }
  if (mode === "advantage") {
    return { shade: (a) => (top ? Math.sign(a) * Math.sqrt(Math.abs(a) / top) : 0), signed: true,
      ticks: top ? [number(-top, 3), "0", number(top, 3)] : ["0"],
      note: top ? "advantage × weight, square-root scale" : "the advantage is 0: this response trains nothing" };
  }
  return { shade: (v) => (top ? Math.sqrt(Math.max(v, 0) / top) : 0), signed: false,
    ticks: top ? ["0", number(top, 3)] : ["0"], note: `${mode === "entropy" ? "nats, " : ""}square-root scale` };
}

// What was trained with: the recorded weights, or the formula's where these are the same.
function trainedWeights(data, settings) {
  const { weight, distance, entropy } = data.numbers;
  if (weight) return weight;
  if (distance && entropy && settings.tau != null) return creditWeights(distance, entropy, settings);
  return new Float64Array(data.count).fill(1);
}

const distanceName = (settings) => (settings.distance === "reverse_kl" ? "Reverse KL to reference" : "Squared Hellinger distance");

// [name, value] of everything that is known of a token; asTrained: its weight before the sliders moved.
function tokenFacts(pane, i) {
  const { numbers, versions } = pane.data;
  const { settings } = pane.item;
  const normalised = Math.min(1, Math.max(0, numbers.entropy ? numbers.entropy[i] / Math.log(settings.vocab_size) : NaN));
  const facts = [["Weight", pane.weights[i], 5]];
  if (pane.moved) facts.push(["Weight as trained", pane.trained[i], 5]);
  facts.push(["Advantage × weight", pane.advantages[i] * pane.weights[i]], ["Advantage", pane.advantages[i]]);
  if (numbers.distance) facts.push([distanceName(settings), numbers.distance[i]]);
  if (numbers.hellinger) facts.push(["Squared Hellinger distance", numbers.hellinger[i]]);
  if (numbers.entropy) facts.push(["Entropy, nats", numbers.entropy[i]], ["Normalised entropy", normalised]);
  if (pane.scores) facts.push(["Score", pane.scores[i]]);
  if (numbers.log_prob) facts.push(["Log-prob, trainer", numbers.log_prob[i]]);
  if (numbers.log_prob && numbers.gap) facts.push(["Log-prob, engine", numbers.log_prob[i] + numbers.gap[i]]);
  if (numbers.ratio) facts.push(["Ratio", numbers.ratio[i]]);
  if (numbers.clipped) facts.push(["Clipped", numbers.clipped[i] ? "yes" : "no"]);
  if (numbers.reverse_kl) facts.push(["Reverse KL to reference", numbers.reverse_kl[i]]);
  const version = versions.find(([, start, end]) => i >= start && i < end);
  if (version) facts.push(["Weight version", String(version[0])]);
  facts.push(["Token id", String(pane.data.ids[i])], ["Position", `${i + 1} of ${pane.data.count}`]);
  return facts.map(([name, value, digits]) => [name, typeof value === "string" ? value : number(value, digits)]);
}

class HeatPane {
  // uniform: GRPO's credit on the same response.
  constructor(item, data, { uniform = false, title }) {
    Object.assign(this, { item, data, uniform });
    this.trained = trainedWeights(data, item.settings);
    this.advantages = data.numbers.token_advantage || new Float64Array(data.count).fill(item.advantage ?? 0);
    this.box = el("div", { class: "tokens", tabindex: 0, role: "application", "aria-roledescription": "token map",
      "aria-label": `${title}: ${plural(data.count, "token")}. Arrow keys move from token to token.` });
    this.summary = el("span", { class: "quiet" });
    this.element = el("section", { class: uniform ? "pane uniform" : "pane" },
      el("h4", {}, el("span", { class: "pane-title", text: title }), " ", this.summary), this.box);
    this.spans = data.texts.map((text, i) => {
      const span = appendText(el("span", { class: text.includes("\n") ? "tok nl" : "tok" }), text);
      span.dataset.i = i;
      return span;
    });
    this.box.append(...this.spans);
    if (!data.count) this.box.append(el("p", { class: "quiet", text: "An empty response." }));
    this.setWeights(null);
    const token = (event) => event.target.closest(".tok");
    this.box.addEventListener("pointerover", (event) => token(event) && event.pointerType === "mouse" && this.point(token(event)));
    this.box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.leave());
    this.box.addEventListener("click", (event) => token(event) && this.point(token(event)));
    this.box.addEventListener("focus", () => this.box.matches(":focus-visible") && this.at(this.place ?? 0));
    this.box.addEventListener("blur", () => this.leave());
    this.box.addEventListener("keydown", (event) => this.key(event));
  }

  // settings of the sliders; null: as trained.
  setWeights(settings) {
    const { distance, entropy } = this.data.numbers;
    const used = settings ? { ...this.item.settings, ...settings } : this.item.settings;
    this.moved = Boolean(settings && distance && !this.uniform);
    this.scores = distance && entropy && used.kappa != null && !this.uniform ? creditScores(distance, entropy, used) : null;
    if (this.uniform) this.weights = new Float64Array(this.data.count).fill(1);
    else this.weights = this.moved ? creditWeights(distance, entropy, used) : this.trained;
    const { effective } = creditSummary(this.weights);
    this.summary.textContent = this.uniform ? "every token the same" : `effective fraction ${percent(effective)}`;
  }

  colour(mode, scale) {
    const values = MODES[mode].values(this);
    this.spans.forEach((span, i) => {
      const v = values ? scale.shade(values[i]) || 0 : 0;
      span.style.setProperty("--v", Math.min(1, Math.abs(v)).toFixed(3));
      span.classList.toggle("low", v < 0);
    });
  }

  mark(start, end) {
    this.spans.forEach((span, i) => span.classList.toggle("in-step", i >= start && i < end));
  }

  at(place) {
    this.place = place;
    this.spans[place]?.scrollIntoView({ block: "nearest" });
    if (this.spans[place]) this.point(this.spans[place]);
  }

  point(span) {
    this.leave();
    this.place = Number(span.dataset.i);
    span.classList.add("on");
    showTip(span, this, this.place);
  }

  leave() {
    this.box.querySelector(".tok.on")?.classList.remove("on");
    $("tip").hidden = true;
  }

  key(event) {
    if (event.key === "Escape") return this.leave();
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (!move || !this.data.count) return undefined;
    event.preventDefault();
    const from = this.box.querySelector(".tok.on") || event.key === "Home" ? this.place : this.place ?? -1;
    return this.at(Math.min(this.data.count - 1, Math.max(0, from + move)));
  }
}

function showTip(span, pane, i) {
  const tip = $("tip");
  const text = appendText(el("bdi", { class: "tip-text" }), pane.data.texts[i].slice(0, 200) || "(inside a character)");
  tip.replaceChildren(text, el("dl", {}, ...tokenFacts(pane, i).flatMap(([name, value]) => [
    el("dt", { text: name }), el("dd", { "data-name": name, text: value })])));
  tip.hidden = false;
  tipOf = { span, box: pane.box };
  placeTip();
}

let tipOf = null; // the token that the tip belongs to

// Beside its token; gone where the token is scrolled out of sight.
function placeTip() {
  const tip = $("tip");
  if (tip.hidden || !tipOf) return;
  const { span, box } = tipOf;
  const place = span.getClientRects()[0] || span.getBoundingClientRect();
  const frame = box.getBoundingClientRect();
  if (place.bottom < Math.max(0, frame.top) || place.top > Math.min(window.innerHeight, frame.bottom)) {
    tip.hidden = true;
    return;
  }
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const below = place.bottom + 8 + height < window.innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, window.innerWidth - width - 8))}px`;
  tip.style.top = `${Math.max(8, below ? place.bottom + 8 : place.top - height - 8)}px`;
}
