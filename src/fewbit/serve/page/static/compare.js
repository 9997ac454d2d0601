// Two answers to the same prompt: where they part, and which tokens stand in one of them only.

import { make } from "./dom.js";

const MOST_CELLS = 2 ** 24; // of the table below; longer answers are compared place by place

/**
 * How two lists of tokens differ.
 *
 * `same`: how many are equal before the first difference; `only`: for each list, which of its tokens are not in the
 * longest run of tokens that both have in the same order; `aligned`: false if the lists are too long for that and each
 * token was held against the one at its own place.
 */
export function difference(a, b) {
  const shorter = Math.min(a.length, b.length);
  let same = 0;
  while (same < shorter && a[same].key === b[same].key) same += 1;
  const only = [a, b].map((list) => new Uint8Array(list.length).fill(1, same));
  const rows = a.length - same, columns = b.length - same;
  if (rows * columns > MOST_CELLS) {
    for (let i = same; i < shorter; i += 1) if (a[i].key === b[i].key) only[0][i] = only[1][i] = 0;
    return { same, only, aligned: false };
  }
  // lengths[i * width + j]: the longest common run of what follows a[same + i] and b[same + j], these included
  const width = columns + 1;
  const lengths = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      lengths[at] = a[same + i].key === b[same + j].key
        ? lengths[at + width + 1] + 1
        : Math.max(lengths[at + width], lengths[at + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    if (a[same + i].key === b[same + j].key) {
      only[0][same + i] = only[1][same + j] = 0;
      i += 1;
      j += 1;
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return { same, only, aligned: true };
}

/** Marks two answers while they come. */
export class Comparison {
  #due = 0;
  #legend = make(
    "p", { class: "legend" },
    make("span", { class: "parting", role: "mark" }, "first difference"), " ",
    make("span", { class: "differs", role: "mark" }, "in this answer only"),
  );
  #verdict = make("p", { class: "verdict" });

  constructor(first, second) {
    this.answers = [first, second];
    this.element = make("div", { class: "comparison" }, this.#verdict, this.#legend);
    this.update(true);
  }

  /** Look again; while tokens come not more often than takes a tenth of the time. */
  update(now = false) {
    const began = performance.now();
    if (!now && began < this.#due) return;
    const [a, b] = this.answers;
    const found = difference(a.tokens, b.tokens);
    const running = [a, b].some((answer) => answer.state === "running");
    // What one answer has not yet come to is no difference.
    const both = Math.min(a.tokens.length, b.tokens.length);
    const parted = found.same < both || (!running && a.tokens.length !== b.tokens.length);
    this.answers.forEach((answer, side) => mark(answer, parted ? found.only[side] : [], parted ? found.same : -1));
    this.#verdict.textContent = verdict(this.answers, found, parted, running);
    this.#legend.hidden = !parted;
    this.#due = performance.now() + Math.max(50, 10 * (performance.now() - began));
  }
}

function mark(answer, only, parting) {
  for (const { span, from, to } of answer.units) {
    let differs = false;
    for (let i = from; i < to; i += 1) differs ||= Boolean(only[i]);
    const first = from <= parting && parting < to;
    if (span.classList.contains("differs") === differs && span.classList.contains("parting") === first) continue;
    span.classList.toggle("differs", differs);
    span.classList.toggle("parting", first);
    if (differs) span.setAttribute("role", "mark");
    else span.removeAttribute("role");
  }
}

function verdict([a, b], { same, only, aligned }, parted, running) {
  if (!a.tokens.length && !b.tokens.length) return running ? "" : "No tokens to compare.";
  if (!parted) return running ? `The same so far: ${tokens(same)}.` : `The same ${tokens(same)}.`;
  const [left, right] = [a, b].map((answer) => {
    const token = answer.tokens[same];
    return token ? `${quoted(token.text)} (${percent(token.logprob)})` : "its end";
  });
  const [ours, theirs] = only.map((list) => list.reduce((sum, one) => sum + one, 0));
  const how = aligned ? "" : " Too long to align: each token is held against the one at its own place.";
  return (
    `The same for ${tokens(same)}, then ${left} against ${right}. ` +
    `${ours} of ${a.tokens.length} and ${theirs} of ${b.tokens.length} tokens stand in one answer only.${how}`
  );
}

const tokens = (n) => (n === 1 ? "1 token" : `${n} tokens`);
const quoted = (text) => `“${text.replaceAll("\n", "⏎")}”`;
const DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const percent = (logprob) => `${DIGITS.format(100 * Math.exp(logprob))} %`;
