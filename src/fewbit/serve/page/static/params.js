// The parameters as fields of a request. What is empty is left out; what is wrong is the server's to refuse.

import { byId } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };

/** {temperature: 0.5, stop: ["\n"], ...}, and the system prompt beside it. */
export function parameters() {
  const fields = {};
  for (const name of NUMBERS) {
    const text = byId(name).value.trim();
    if (text) fields[name] = number(name, text);
  }
  const stops = byId("stop").value.split("\n").filter(Boolean).map(unescaped);
  if (stops.length) fields.stop = stops;
  return { fields, system: byId("system").value };
}

/** What is set, in a line. */
export function briefly() {
  const set = NUMBERS.filter((name) => byId(name).value.trim()).map((name) => `${name} ${byId(name).value.trim()}`);
  return set.join(", ") || "the server's defaults";
}

/** A seed for answers that are to be compared. */
export function drawnSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

function number(name, text) {
  const value = Number(text);
  if (!Number.isFinite(value)) return text; // a string, which the server refuses with its reason
  if (Number.isInteger(value) && !Number.isSafeInteger(value)) {
    const most = Number.MAX_SAFE_INTEGER;
    throw new RangeError(`${name} ${text} is more than a browser holds exactly: give at most ${most}`);
  }
  return value;
}

const unescaped = (text) => text.replace(/\\(.)/g, (whole, letter) => ESCAPES[letter] ?? whole);
