// The text format of /metrics.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

/** Samples by metric: Map of name → [{labels, value}]. */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!found) continue;
    const [, name, inner = "", value] = found;
    const labels = Object.fromEntries([...inner.matchAll(LABEL)].map(([, label, text]) => [label, unescaped(text)]));
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push({ labels, value: Number(value.replace("Inf", "Infinity")) });
  }
  return samples;
}

const unescaped = (text) => text.replace(/\\(.)/g, (whole, letter) => ESCAPES[letter] ?? whole);
