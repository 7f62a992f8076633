// Credit weights (section 4, arXiv 2605.03327) in double precision: algorithms/credit.py in the page.

// settings: {tau, kappa, entropy_normalization, vocab_size}
function creditScores(distance, entropy, settings) {
  const scale = settings.entropy_normalization === "log_vocab" ? Math.log(settings.vocab_size) : 0;
  const out = new Float64Array(distance.length);
  for (let i = 0; i < out.length; i++) {
    let h = Math.max(entropy[i], 0);
    if (scale) h = Math.min(h / scale, 1);
    out[i] = distance[i] * Math.pow(h, settings.kappa); // Math.pow(0, 0) is 1
  }
  return out;
}

// w = T softmax(d Hn^kappa / tau): mean 1.
function creditWeights(distance, entropy, settings) {
  const out = creditScores(distance, entropy, settings);
  let peak = -Infinity;
  for (const s of out) peak = Math.max(peak, s / settings.tau);
  let sum = 0;
  for (let i = 0; i < out.length; i++) sum += out[i] = Math.exp(out[i] / settings.tau - peak);
  for (let i = 0; i < out.length; i++) out[i] *= out.length / sum;
  return out;
}

// The most that a weight can be off, relative to itself, when distance and entropy are off by halfSteps.
function creditErrorBound(distance, entropy, settings, halfSteps) {
  if (!halfSteps[0] && !halfSteps[1]) return 0;
  const moved = (values, by) => values.map((v) => Math.max(v + by, 0));
  const low = creditScores(moved(distance, -halfSteps[0]), moved(entropy, -halfSteps[1]), settings);
  const high = creditScores(moved(distance, halfSteps[0]), moved(entropy, halfSteps[1]), settings);
  const here = creditScores(distance, entropy, settings);
  let change = 0;
  for (let i = 0; i < here.length; i++) change = Math.max(change, high[i] - here[i], here[i] - low[i]);
  return Math.expm1(Math.min((2 * change) / settings.tau, 700));
}

function sumOf(values) {
  let sum = 0;
  for (const v of values) sum += v;
  return sum;
}

// (sum w)^2 / (T sum w^2): 1 is uniform credit.
function effectiveFraction(weights) {
  let squares = 0;
  for (const w of weights) squares += w * w;
  return squares ? Math.min(1, sumOf(weights) ** 2 / (weights.length * squares)) : 1;
}

// Share of the credit on the heaviest ceil(part T) tokens.
function topShare(weights, part) {
  const total = sumOf(weights);
  if (!total) return 0;
  const heaviest = Math.ceil(part * weights.length - 1e-9);
  return sumOf(Float64Array.from(weights).sort().subarray(weights.length - heaviest)) / total;
}

function largest(values) {
  let top = -Infinity;
  for (const v of values) if (v > top) top = v;
  return top;
}

function creditSummary(weights) {
  return {
    effective: effectiveFraction(weights),
    top1: topShare(weights, 0.01),
    top10: topShare(weights, 0.1),
    max: weights.length ? largest(weights) : 0,
  };
}
