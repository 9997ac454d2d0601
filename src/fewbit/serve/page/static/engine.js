// The live view: what each engine does now and did in the last minute, from /metrics once a second.

import { metrics } from "./api.js";
import { byId, count, make, rate } from "./dom.js";
import { parse } from "./prometheus.js";

const EVERY_MS = 1000;
const SAMPLES = 60;
const WIDTH = 240, HEIGHT = 44; // of the curve, in its own units
const SVG = "http://www.w3.org/2000/svg";

/** Watch until the page is closed; a page that nobody sees asks nothing. */
export function watch() {
  const engines = new Map();
  const look = async () => {
    if (!document.hidden) {
      try {
        show(engines, parse(await metrics()));
      } catch (error) {
        say(error.message, true);
        for (const engine of engines.values()) engine.gone();
      }
    }
    setTimeout(look, EVERY_MS);
  };
  look();
}

function show(engines, samples) {
  const up = samples.get("fewbit:engine_up") ?? [];
  const names = up.map((sample) => sample.labels.model_name);
  for (const [name, engine] of engines) {
    if (names.includes(name)) continue;
    engine.element.remove();
    engines.delete(name);
  }
  for (const { labels: { model_name: name }, value } of up) {
    if (!engines.has(name)) engines.set(name, new Engine(name)).get(name).enter(byId("engines"));
    engines.get(name).update(value === 1, (metric) => of(samples, metric, name));
  }
  const all = [...engines.values()];
  const speed = all.reduce((sum, engine) => sum + engine.speed, 0);
  const running = all.reduce((sum, engine) => sum + engine.running, 0);
  say(all.length ? `${rate(speed)} tokens/s, ${count(running)} running` : "no model is loaded", !all.length);
  byId("engines").classList.toggle("several", all.length > 1);
}

/** The line that stands for the view where it is folded; a problem shows in any case. */
function say(text, problem) {
  byId("engine-brief").textContent = text;
  byId("engine").classList.toggle("silent", problem);
}

/** The value of a metric for one model; null if there is none. */
function of(samples, metric, name) {
  return samples.get(metric)?.find((sample) => sample.labels.model_name === name)?.value ?? null;
}

class Engine {
  #before = null; // {tokens, time} of the last look
  #history = [];

  constructor(name) {
    this.speed = this.running = 0;
    this.figures = {};
    const figure = (key, label) => {
      this.figures[key] = make("dd", { "data-figure": key }, "–");
      return make("div", {}, make("dt", {}, label), this.figures[key]);
    };
    this.line = vector("path", { class: "line" });
    this.area = vector("path", { class: "area" });
    this.curve = vector("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.curve.append(this.area, this.line);
    this.meter = make("meter", { min: "0", max: "1", "aria-label": `K/V cache of ${name} in use` });
    this.element = make(
      "section", { class: "engine", "aria-label": `Engine of ${name}` },
      make("h3", {}, name),
      this.curve,
      make(
        "dl", {},
        figure("speed", "tokens/s"), figure("running", "running"), figure("waiting", "waiting"),
        figure("blocks", "K/V blocks"),
      ),
      this.meter,
    );
  }

  enter(parent) {
    parent.append(this.element);
  }

  update(up, value) {
    this.element.classList.toggle("down", !up);
    if (!up) return this.gone();
    const tokens = value("fewbit:generation_tokens_total") ?? 0, time = performance.now();
    const { tokens: was, time: then } = this.#before ?? { tokens, time: time - EVERY_MS };
    this.speed = Math.max(0, (1000 * (tokens - was)) / (time - then)); // an engine that was started again counts from 0
    this.#before = { tokens, time };
    this.running = value("fewbit:num_requests_running") ?? 0;
    const used = value("fewbit:kv_cache_blocks_used") ?? 0, blocks = value("fewbit:kv_cache_blocks") ?? 0;
    this.#set("speed", rate(this.speed));
    this.#set("running", count(this.running));
    this.#set("waiting", count(value("fewbit:num_requests_waiting") ?? 0));
    this.#set("blocks", `${count(used)} of ${count(blocks)}`);
    this.meter.value = blocks ? used / blocks : 0;
    this.#draw();
  }

  /** It does not answer: no figure is better than an old one. */
  gone() {
    this.#before = null;
    this.speed = this.running = 0;
    for (const key of Object.keys(this.figures)) this.#set(key, "–");
    this.meter.value = 0;
    this.#draw();
  }

  #set(key, text) {
    this.figures[key].textContent = text;
  }

  #draw() {
    this.#history = [...this.#history, this.speed].slice(-SAMPLES);
    const top = Math.max(...this.#history, 1), step = WIDTH / (SAMPLES - 1);
    const start = WIDTH - (this.#history.length - 1) * step;
    const height = (value) => HEIGHT - 2 - (value / top) * (HEIGHT - 4);
    const points = this.#history.map((v, i) => `${(start + i * step).toFixed(1)},${height(v).toFixed(1)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M${start.toFixed(1)},${HEIGHT}L${points.join("L")}L${WIDTH},${HEIGHT}Z`);
    const peak = Math.max(...this.#history);
    this.curve.setAttribute("aria-label", `Tokens a second over the last minute, ${rate(peak)} at most`);
  }
}

function vector(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
