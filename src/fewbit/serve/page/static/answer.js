// One answer as it comes: its text, piece by piece, and its figures.

import { count, duration, make, rate } from "./dom.js";

const ENDS = { stop: "ended by itself", length: "cut at max tokens" };

/** What one chunk of either protocol brings: text, thought, tokens (if log-probabilities were asked for), the end. */
export function pieceOf(choice) {
  const logprobs = choice.logprobs ?? {};
  return {
    text: choice.delta ? (choice.delta.content ?? "") : choice.text,
    thought: choice.delta?.reasoning ?? "",
    tokens: logprobs.content
      ? logprobs.content.map(({ token, bytes, logprob }) => ({ key: bytes?.join() ?? token, text: token, logprob }))
      : (logprobs.tokens ?? []).map((text, i) => ({ key: text, text, logprob: logprobs.token_logprobs[i] })),
    finish: choice.finish_reason,
    stoppedAt: choice.stop_reason,
  };
}

export class Answer {
  constructor(model) {
    this.model = model;
    this.text = "";
    this.tokens = [];
    this.units = []; // runs of text with the tokens that they came from: [{span, from, to}]
    this.state = "running"; // then complete, stopped or failed
    this.usage = null;
    this.pieces = 0;
    this.sent = performance.now();
    this.first = this.last = null;

    this.thoughts = make("div", { class: "thoughts", role: "note", "aria-label": "Thoughts", hidden: "" });
    this.body = make("div", { class: "text" });
    this.figures = make("dl", { class: "figures" });
    this.problem = make("p", { class: "problem", hidden: "" });
    this.element = make(
      "article",
      { class: "answer running", "aria-busy": "true", "aria-label": `Answer of ${model}` },
      make("h3", {}, model), this.thoughts, this.body, this.problem, this.figures,
    );
  }

  /** Take a chunk of the stream; its text shows at once, the figures when `show` is called. */
  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { text, thought, tokens, finish, stoppedAt } = pieceOf(choice);
    if (text || thought || tokens.length) {
      this.last = performance.now();
      this.first ??= this.last;
      this.pieces += 1;
      this.text += text;
      this.tokens.push(...tokens);
      if (thought) this.#append(thought, this.thoughts);
      else if (text) this.#append(text, this.body);
    }
    if (finish) this.end = typeof stoppedAt === "string" ? `stopped at “${stoppedAt}”` : (ENDS[finish] ?? finish);
  }

  /** The last state: complete, stopped or failed. */
  settle(state, message = "") {
    this.state = state;
    this.element.classList.replace("running", state);
    this.element.setAttribute("aria-busy", "false");
    if (message) {
      this.problem.textContent = message;
      this.problem.hidden = false;
    }
    this.show();
  }

  /** How many tokens came: as the server counted them, else as they were counted here. */
  get length() {
    return this.usage?.completion_tokens ?? (this.tokens.length || this.pieces);
  }

  /** Tokens a second from the first token to the last; null while there are less than two. */
  get speed() {
    const seconds = (this.last - this.first) / 1000;
    return this.length > 1 && seconds > 0 ? (this.length - 1) / seconds : null;
  }

  get firstToken() {
    return this.first === null ? null : this.first - this.sent;
  }

  /** The figures below the text. A count without the server's word for it carries a "~". */
  show() {
    this.figures.hidden = this.state === "failed" && !this.pieces;
    const exact = this.usage || this.tokens.length;
    const waiting = this.first === null && this.state === "running";
    const rows = [
      ["First token", "ttft", waiting ? sinceSent(this) : shown(this.firstToken, duration)],
      ["Tokens/s", "speed", shown(this.speed, rate)],
      ["Tokens", "count", `${exact ? "" : "~"}${count(this.length)}`],
    ];
    if (this.usage) rows.push(["Prompt", "prompt", promptCount(this.usage)]);
    const end = this.state === "stopped" ? "stopped by you" : this.state === "complete" ? this.end : null;
    if (end) rows.push(["End", "end", end]);
    rows.forEach(([name, kind, value], i) => {
      const row = this.figures.children[i] ?? this.figures.appendChild(make("div", {}, make("dt"), make("dd")));
      row.dataset.figure = kind;
      row.firstChild.textContent = name;
      row.lastChild.textContent = value;
    });
  }

  /** Half a character has no text yet: its tokens go with the text that completes it. */
  #append(text, place) {
    const { span: last, to: from } = this.units.at(-1) ?? { to: 0 };
    if (last?.parentNode === place && from === this.tokens.length) {
      last.firstChild.appendData(text);
      return;
    }
    const span = make("span", {}, text);
    this.units.push({ span, from, to: this.tokens.length });
    place.append(span);
    place.hidden = false;
  }
}

const sinceSent = (answer) => `${duration(performance.now() - answer.sent)} …`;
const shown = (value, format) => (value === null ? "–" : format(value));

function promptCount({ prompt_tokens: prompt, prompt_tokens_details: details }) {
  const cached = details?.cached_tokens ?? 0;
  return cached ? `${count(prompt)}, ${count(cached)} of them cached` : count(prompt);
}
