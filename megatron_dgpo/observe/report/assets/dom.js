// Elements, text from outside and numbers as people read them.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Text only ever enters through textContent.
function el(tag, attributes = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.setAttribute("class", value);
    else if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

const MARKS = new Map([
  [0x61c, "ALM"], [0x200b, "ZWSP"], [0x200e, "LRM"], [0x200f, "RLM"], [0x202a, "LRE"], [0x202b, "RLE"],
  [0x202c, "PDF"], [0x202d, "LRO"], [0x202e, "RLO"], [0x2066, "LRI"], [0x2067, "RLI"], [0x2068, "FSI"],
  [0x2069, "PDI"], [0x2028, "LS"], [0x2029, "PS"], [0xfeff, "BOM"], [0x7f, "DEL"],
]);
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/;
const UNSEEN_ALL = new RegExp(UNSEEN.source, "g");

// Appends text so that nothing in it acts: controls keep their place, each isolated and with a visible name.
function appendText(parent, text) {
  let rest = text;
  while (rest) {
    const place = rest.search(UNSEEN);
    if (place < 0) break;
    if (place) parent.append(rest.slice(0, place));
    const code = rest.charCodeAt(place);
    const name = MARKS.get(code) || `x${code.toString(16).padStart(2, "0").toUpperCase()}`;
    parent.append(el("span", { class: "mark", "data-mark": name, text: rest[place] }));
    rest = rest.slice(place + 1);
  }
  if (rest) parent.append(rest);
  return parent;
}

// For one line of a list: controls become a dot.
const oneLine = (text) => text.replace(UNSEEN_ALL, "·").replace(/\s+/g, " ");

function number(value, digits = 4) {
  if (value == null || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || size < 1e-4) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    text = `${mantissa.replace(/\.?0+$/, "")}e${Number(exponent)}`;
  } else text = size >= 1e4 ? Math.round(value).toString() : String(Number(value.toPrecision(digits)));
  return text.replace(/-/g, "−");
}

const count = (value) => value.toLocaleString("en-US");
const percent = (value) => (value == null ? "–" : `${number(100 * value, 3)}%`);
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

// Lets the page draw and answer between pieces of long work.
const breathe = () => new Promise((done) => setTimeout(done, 0));
