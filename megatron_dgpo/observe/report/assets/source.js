// Where a run's data comes from. A source has overview() and sample(n), n a place in overview.samples. The live
// inspector has a file of its own in the place of this one, with a FetchSource.

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
