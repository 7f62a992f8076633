// One response's bytes, as observe/report/encode.py describes them, to numbers.

async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// Width in bytes of a column's numbers.
function columnWidth(column) {
  return { const: 0, u8: 1, u16: 2, u32: 4, f16: 2, f32: 4, fixed: column.planes }[column.kind];
}

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const mantissa = bits & 0x3ff;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  if (exponent === 31) return mantissa ? NaN : sign * Infinity;
  return sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
}

function decodeColumn(column, bytes, count) {
  const out = new Float64Array(count);
  if (column.kind === "const") return out.fill(column.value);
  const width = columnWidth(column);
  const asFloat = new DataView(new ArrayBuffer(4));
  for (let i = 0; i < count; i++) {
    let z = 0;
    for (let p = width - 1; p >= 0; p--) z = z * 256 + bytes[p * count + i];
    if (column.kind === "f32") {
      asFloat.setUint32(0, z);
      z = asFloat.getFloat32(0);
    } else if (column.kind === "f16") z = halfToNumber(z);
    else if (column.kind === "fixed") z = column.step * (z % 2 ? -(z + 1) / 2 : z / 2);
    out[i] = z;
  }
  return out;
}

// pieces: the run's table of [token id, text], for responses that have none of their own.
function decodeSample(bytes, pieces) {
  const head = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const { columns, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + head)));
  const table = header.pieces || pieces;
  const numbers = {};
  let at = 4 + head;
  for (const column of columns) {
    const size = columnWidth(column) * header.count;
    numbers[column.name] = decodeColumn(column, bytes.subarray(at, at + size), header.count);
    at += size;
  }
  const token = Array.from(numbers.token || [], (place) => table[place]);
  const halfStep = (name) => {
    const column = columns.find((c) => c.name === name);
    return column && column.kind === "fixed" ? column.step / 2 : 0;
  };
  return {
    ...header,
    numbers,
    ids: token.map((pair) => pair[0]),
    texts: token.map((pair) => pair[1]),
    halfSteps: [halfStep("distance"), halfStep("entropy")], // how far they may be from the recorded ones
  };
}
