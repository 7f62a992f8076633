// Where a run's data comes from. A source has overview() and sample(n), n a place in overview.samples.

class EmbeddedSource {
  constructor(prefix) {
    this.prefix = prefix;
  }

  async chunk(name) {
    const element = document.getElementById(`${this.prefix}-${name}`);
    if (!element) throw new Error(`this file has no part ${this.prefix}-${name}: it is not complete`);
    return gunzip(fromBase64(element.textContent));
  }

  async overview() {
    const { pieces, ...overview } = JSON.parse(new TextDecoder().decode(await this.chunk("overview")));
    this.pieces = pieces;
    return overview;
  }

  async sample(n) {
    return decodeSample(await this.chunk(n), this.pieces);
  }
}

// base + "/overview" is JSON; base + "/sample?step=&replica=&row=" one response's bytes.
class FetchSource {
  constructor(base) {
    this.base = base;
  }

  async get(path) {
    const answer = await fetch(this.base + path);
    if (!answer.ok) throw new Error(`${answer.status}: ${(await answer.text()).slice(0, 500)}`);
    return answer;
  }

  async overview() {
    this.last = await (await this.get("/overview")).json();
    return this.last;
  }

  async sample(n) {
    const file = this.last.files[this.last.samples.file[n]];
    const row = this.last.samples.row[n];
    const answer = await this.get(`/sample?step=${file.step}&replica=${file.replica}&row=${row}`);
    return decodeSample(new Uint8Array(await answer.arrayBuffer()), null);
  }
}
