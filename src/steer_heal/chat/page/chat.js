"use strict";
// All text is set by textContent: none of it can become a part of the page.
const at = (id) => document.getElementById(id);
const made = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });

let facts = null;
let turns = {}; // by state: what the user and the state said in turn
let running = null; // the AbortController of the answers under way

const chosen = () => [...at("states").querySelectorAll("input:checked")].map((box) => box.value);

async function begin() {
  facts = await (await fetch("facts")).json();
  document.title = `${facts.run}: steer-heal chat`;
  at("title").textContent = `Talk to ${facts.run}`;
  at("facts").textContent = `model ${facts.model}, trait ${facts.trait}, round ${facts.round}`;
  for (const [name, about] of Object.entries(facts.states)) {
    const label = made("label", name);
    const box = Object.assign(made("input", ""), { type: "checkbox", value: name, checked: facts.shown.includes(name) });
    label.title = about;
    label.append(box, name);
    at("states").append(label);
  }
  at("system").value = facts.system;
  at("dose").value = facts.dose ?? "";
  at("dose").parentElement.hidden = facts.dose_of_round === null; // no vector, no dose
  at("dose").placeholder = facts.dose_of_round === null ? "" : Number(facts.dose_of_round.toPrecision(3)); // empty: exactly that
  at("seed").value = facts.seed;
  reset();
}

function reset() {
  if (running) running.abort();
  turns = Object.fromEntries(Object.keys(facts.states).map((name) => [name, []]));
  at("log").replaceChildren();
}

function card(name) {
  const article = made("article", `answer ${name}`);
  const header = made("header", "");
  const text = made("p", "");
  const footer = made("footer", "", "waiting");
  header.append(made("b", "", name), facts.states[name]);
  article.append(header, text, footer);
  return { article, text, footer };
}

// Reads the answer line by line, and returns what was written: all of it, or as far as it came.
async function answer(name, question, parts, signal) {
  const failed = (why) => {
    show(parts.footer, why);
    parts.article.classList.add("failed");
  };
  let text = "";
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("answer", { method: "POST", headers, body: JSON.stringify(question), signal });
    if (!response.ok) {
      failed((await response.json()).error);
      return null;
    }
    parts.footer.textContent = "writing";
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let ended = false;
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      const lines = (rest + piece.value).split("\n");
      rest = lines.pop();
      for (const event of lines.map((line) => JSON.parse(line))) {
        if (event.error !== undefined) {
          failed(event.error);
          return null;
        }
        if (event.done) {
          ended = true;
          text = event.done.text;
          const { n_tokens: n, seconds, cut } = event.done;
          parts.footer.textContent = `${n} tokens in ${seconds.toFixed(1)} s${cut ? ", cut at the limit" : ""}`;
        } else {
          text += event.text;
        }
        show(parts.text, text);
      }
    }
    if (!ended) failed("broke off");
  } catch (error) {
    if (error.name !== "AbortError") {
      failed("steer-heal does not answer: is it still running?");
      return text || null;
    }
    parts.footer.textContent = "stopped";
  }
  return text;
}

function show(place, text) {
  const page = document.documentElement;
  const follows = page.scrollHeight - page.clientHeight - page.scrollTop < 80;
  place.textContent = text;
  if (follows) page.scrollTop = page.scrollHeight;
}

async function ask(message) {
  const names = chosen();
  const own = turns; // a new conversation begins with new ones
  const after = {};
  const answers = made("div", "answers");
  const cards = Object.fromEntries(names.map((name) => [name, card(name)]));
  answers.append(...names.map((name) => cards[name].article));
  const turn = made("section", "turn");
  turn.append(made("p", "message", message), answers);
  at("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  running = new AbortController();
  at("send").textContent = "Stop";
  const dose = at("dose").value === "" ? null : at("dose").valueAsNumber;
  const settings = { system: at("system").value, dose, seed: at("seed").valueAsNumber };
  for (const name of names) {
    if (running.signal.aborted) {
      cards[name].footer.textContent = "stopped";
      continue;
    }
    const asked = [...own[name], message];
    const text = await answer(name, { state: name, turns: asked, ...settings }, cards[name], running.signal);
    if (text !== null) after[name] = [...asked, text];
  }
  if (!running.signal.aborted) Object.assign(own, after); // a stopped message is no turn: all states have the same ones
  running = null;
  at("send").textContent = "Send";
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const message = at("message").value.trim();
  if (running) {
    running.abort();
  } else if (message && chosen().length && at("settings").reportValidity()) {
    at("message").value = "";
    ask(message);
  }
});
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) at("ask").requestSubmit();
  }
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("reset").addEventListener("click", reset);
begin();
