// Puts the parts of the page together.

import { key, models } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, make } from "./dom.js";
import { watch } from "./engine.js";
import { briefly } from "./params.js";

const prompt = byId("prompt");
const mode = () => document.querySelector("input[name=mode]:checked").value;

const conversation = new Conversation(
  byId("turns"),
  () => ({ model: byId("model").value, second: byId("second").value, mode: mode() }),
  { change: changed, grown: follow, refused, asked: () => ((following = true), prompt.focus()) },
);

function changed(status) {
  const { running, empty } = conversation;
  byId("status").textContent = status;
  byId("send").hidden = running;
  byId("stop-button").hidden = !running;
  byId("clear").disabled = empty;
  byId("welcome").hidden = !empty;
  follow();
}

/** Stay at the end of the text, unless the reader went up; at the end again, follow again. */
let following = true, due = false, above = 0, height = 0;
function follow() {
  if (!following || due) return;
  due = true; // once a frame is enough
  requestAnimationFrame(() => {
    due = false;
    if (following) scrollTo(0, document.documentElement.scrollHeight);
  });
}
addEventListener("scroll", () => {
  const { scrollHeight } = document.documentElement;
  if (scrollY < above && scrollHeight >= height) following = false; // and not because the text became shorter
  else if (innerHeight + scrollY >= scrollHeight - 80) following = true;
  [above, height] = [scrollY, scrollHeight];
}, { passive: true });

function refused(error, turn, answer) {
  if (error.status === 401) return askForKey(error.message);
  const untemplated = turn.mode === "chat" && error.param === "messages" && error.message.includes("/v1/completions");
  if (untemplated && !turn.element.querySelector(".problem button")) {
    answer.problem.append(" ", make("button", { type: "button", onclick: asText }, "Send it as plain text"));
  }
}

function asText() {
  document.querySelector("input[name=mode][value=text]").checked = true;
  modeChanged();
  prompt.focus();
  conversation.again();
}

function send() {
  const text = prompt.value;
  if (!text.trim() || conversation.running) return;
  if (!byId("model").value) return void load(); // it says why there is none
  following = true;
  prompt.value = "";
  fit();
  conversation.send(text);
  prompt.focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
prompt.addEventListener("input", fit);
byId("stop-button").addEventListener("click", stop);
byId("clear").addEventListener("click", () => {
  conversation.clear();
  prompt.focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && conversation.running) stop();
});

function stop() {
  conversation.stop();
  prompt.focus();
}

/** As many lines as the text has, within reason. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function modeChanged() {
  const text = mode() === "text";
  prompt.placeholder = text ? "Text to go on with" : "Message";
  byId("system").disabled = text;
  byId("system").placeholder = text ? "Only in a chat" : "";
}
document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", modeChanged));

// ---- the models, and the key that asking for them may need ----

async function load() {
  try {
    const names = await models();
    const options = (list) => list.map(([value, text]) => make("option", { value }, text));
    const named = names.map((name) => [name, name]);
    for (const [id, list] of [["model", named], ["second", [["", "nobody"], ...named]]]) {
      const chosen = byId(id).value;
      byId(id).replaceChildren(...options(list));
      if (list.some(([value]) => value === chosen)) byId(id).value = chosen;
    }
    greet();
    notice("");
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else notice(error.message);
  }
}

function greet() {
  byId("greeted").textContent = byId("model").value || "the model";
}
byId("model").addEventListener("change", greet);
document.addEventListener("visibilitychange", () => document.hidden || load()); // models come and go

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function askForKey(message) {
  notice(message);
  showKey(true);
}

function showKey(open) {
  byId("key-form").hidden = !open;
  byId("key-toggle").setAttribute("aria-expanded", String(open));
  if (open) byId("key").focus();
}

byId("key-toggle").addEventListener("click", () => showKey(byId("key-form").hidden));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keep(byId("key").value.trim());
});
byId("key-forget").addEventListener("click", () => keep(""));

async function keep(value) {
  key.set(value);
  byId("key").value = "";
  showKey(false);
  byId("key-toggle").classList.toggle("set", Boolean(value));
  prompt.focus();
  await load();
}

byId("params").addEventListener("input", showParameters);
byId("params").addEventListener("submit", (event) => event.preventDefault());
function showParameters() {
  byId("parameters-brief").textContent = briefly();
}

byId("key-toggle").classList.toggle("set", Boolean(key.get()));
if (matchMedia("(max-width: 60rem)").matches) {
  for (const id of ["engine", "parameters"]) byId(id).open = false;
}
modeChanged();
showParameters();
load();
watch();
