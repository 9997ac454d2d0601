// Turns: what was said, and one answer or two side by side; asking, stopping, editing, asking again.

import { stream } from "./api.js";
import { Answer } from "./answer.js";
import { Comparison } from "./compare.js";
import { make, rate } from "./dom.js";
import { drawnSeed, parameters } from "./params.js";

export class Conversation {
  #turns = [];
  #abort = null; // of the answers that run

  /**
   * @param list where the turns go
   * @param settings () → {model, second, mode}: what is chosen now; second "": nobody
   * @param on {change, grown, refused, asked}: told when asking begins or ends, when text came, of a failure, and
   *   when something was asked from within the list
   */
  constructor(list, settings, on) {
    this.list = list;
    this.settings = settings;
    this.on = on;
  }

  get running() {
    return this.#abort !== null;
  }

  get empty() {
    return this.#turns.length === 0;
  }

  /** Ask; resolves when the answers are complete, stopped or failed. */
  async send(prompt) {
    const { model, second, mode } = this.settings();
    const answers = (second ? [model, second] : [model]).map((name) => new Answer(name));
    const before = this.#turns.slice();
    const turn = this.#add({ prompt, mode, answers });
    this.#abort = new AbortController();
    this.#offer();
    this.on.change("Answering.");
    const clock = setInterval(() => answers.forEach((answer) => answer.state === "running" && answer.show()), 100);
    try {
      const { fields, system } = parameters();
      if (second) {
        fields.seed ??= drawnSeed();
        fields.logprobs = mode === "chat" ? true : 0; // they come with the tokens, one by one
      }
      turn.seed = fields.seed;
      const request = { ...fields, stream: true, stream_options: { include_usage: true } };
      if (mode === "chat") request.messages = [...messages(system, before), { role: "user", content: prompt }];
      else request.prompt = prompt;
      await Promise.all(answers.map((answer) => this.#read(turn, answer, request)));
    } catch (error) {
      answers.forEach((answer) => answer.settle("failed", error.message)); // a parameter that cannot be sent
    }
    clearInterval(clock);
    turn.comparison?.update(true);
    this.#abort = null;
    this.#offer();
    this.on.change(spoken(answers));
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#cut(0);
    this.on.change("The conversation is cleared.");
  }

  /** Ask the last prompt again. */
  again() {
    if (this.running) return;
    const { prompt } = this.#turns.at(-1);
    this.#cut(this.#turns.length - 1);
    this.send(prompt);
  }

  async #read(turn, answer, request) {
    const path = turn.mode === "chat" ? "v1/chat/completions" : "v1/completions";
    try {
      for await (const chunk of stream(path, { model: answer.model, ...request }, this.#abort.signal)) {
        answer.take(chunk);
        turn.comparison?.update();
        this.on.grown();
      }
      answer.settle("complete");
    } catch (error) {
      if (error.name === "AbortError") answer.settle("stopped");
      else {
        answer.settle("failed", error.message);
        this.on.refused(error, turn, answer);
      }
    }
  }

  #add(turn) {
    turn.comparison = turn.answers.length > 1 ? new Comparison(...turn.answers) : null;
    turn.said = make("div", { class: "said" });
    turn.element = make(
      "li", { class: turn.comparison ? "turn pair" : "turn" },
      turn.said, make("div", { class: "answers" }, ...turn.answers.map((answer) => answer.element)),
    );
    if (turn.comparison) turn.element.append(turn.comparison.element);
    this.#turns.push(turn);
    this.#showPrompt(turn);
    this.list.append(turn.element);
    return turn;
  }

  #showPrompt(turn) {
    const edit = make("button", { type: "button", class: "quiet edit", onclick: () => this.#edit(turn) }, "Edit");
    edit.disabled = this.running;
    const who = make("h2", { class: "who" }, turn.mode === "chat" ? "You" : "Text to go on with");
    turn.said.replaceChildren(who, make("p", { class: "prompt" }, turn.prompt), edit);
  }

  #edit(turn) {
    const field = make("textarea", { "aria-label": "Edit what you said", rows: "2" });
    field.value = turn.prompt;
    const back = () => {
      this.#showPrompt(turn);
      turn.said.querySelector("button").focus();
    };
    const ask = (event) => {
      event.preventDefault();
      if (!field.value.trim() || this.running) return;
      this.#cut(this.#turns.indexOf(turn));
      this.send(field.value);
      this.on.asked();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // it ends the editing, not an answer
        back();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
    });
    const form = make(
      "form", { class: "editing", onsubmit: ask }, field,
      make("button", { type: "submit" }, "Ask this instead"),
      make("button", { type: "button", class: "quiet", onclick: back }, "Leave it"),
    );
    turn.said.replaceChildren(form);
    field.focus();
  }

  /** What may be done with the turns now: while answers come, nothing; then the last can be asked again. */
  #offer() {
    for (const edit of this.list.querySelectorAll(".edit")) edit.disabled = this.running;
    this.list.querySelector(".again")?.remove();
    const last = this.#turns.at(-1);
    if (!last || this.running) return;
    const action = (name, onclick) => make("button", { type: "button", class: "quiet", onclick }, name);
    const row = make("p", { class: "again" });
    if (last.comparison && last.seed !== undefined) {
      row.append(make("span", { class: "seed" }, `Both with seed ${last.seed}.`));
    }
    row.append(action("Ask again", () => (this.on.asked(), this.again())));
    if (navigator.clipboard) row.append(action("Copy", (event) => copy(last, event.target))); // not without https
    last.element.append(row);
  }

  #cut(from) {
    for (const turn of this.#turns.splice(from)) turn.element.remove();
  }
}

/** What was said before, as the first model answered it, so that two models are asked the same. */
function messages(system, turns) {
  const said = turns.filter((turn) => turn.mode === "chat" && turn.answers[0].text);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...said.flatMap((turn) => [
      { role: "user", content: turn.prompt },
      { role: "assistant", content: turn.answers[0].text },
    ]),
  ];
}

async function copy(turn, button) {
  try {
    await navigator.clipboard.writeText(turn.answers.map((answer) => answer.text).join("\n\n"));
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser does not allow copying";
  }
}

/** For those who do not see the figures. */
function spoken(answers) {
  return answers.map((answer) => {
    const who = answers.length > 1 ? `${answer.model}: ` : "";
    if (answer.state === "failed") return `${who}${answer.problem.textContent}`;
    const speed = answer.speed === null ? "" : `, ${rate(answer.speed)} tokens per second`;
    return `${who}${answer.state === "stopped" ? "Stopped" : "Answer complete"}: ${answer.length} tokens${speed}.`;
  }).join(" ");
}
