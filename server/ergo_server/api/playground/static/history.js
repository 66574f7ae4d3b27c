// What was asked before: in this browser only, without the images themselves.

import { el } from "./dom.js";
import { count } from "./wording.js";

const NAME = "ergo-vqa.history";
const LONGEST = 20;

/** The list in the document. `chosen` is told of an entry that is to be asked again. */
export class History {
  constructor(section, list, chosen) {
    Object.assign(this, { section, list, chosen });
    this.entries = load();
    this.#show();
  }

  /** Adds {id, question, answer, name, sample, thumbnail, total, baseline}; the oldest goes where there are too many. */
  add(entry) {
    this.entries = [entry, ...this.entries].slice(0, LONGEST);
    this.#keep();
  }

  clear() {
    this.entries = [];
    this.#keep();
  }

  #keep() {
    try {
      localStorage.setItem(NAME, JSON.stringify(this.entries));
    } catch {} // full, or switched off: the list is then kept while the page is open
    this.#show();
  }

  #show() {
    this.section.hidden = !this.entries.length;
    this.list.replaceChildren(...this.entries.map((entry) => el("li", {}, this.#button(entry))));
  }

  #button(entry) {
    const picture = entry.thumbnail ? el("img", { src: entry.thumbnail, alt: "" }) : el("span", { class: "no-thumbnail" });
    const cost = `${count(entry.total)} of ${count(entry.baseline)} visual tokens`;
    const text = el(
      "span",
      { class: "asked" },
      el("span", { class: "asked-question" }, entry.question),
      el("strong", {}, entry.answer || "no answer"),
      el("span", { class: "small" }, cost),
    );
    return el("button", { type: "button", class: "entry", onclick: () => this.chosen(entry) }, picture, text);
  }
}

function load() {
  try {
    const entries = JSON.parse(localStorage.getItem(NAME) ?? "[]");
    const whole = ({ question, answer, total, baseline }) =>
      [question, answer].every((text) => typeof text === "string") && [total, baseline].every(Number.isFinite);
    return entries.filter(whole).slice(0, LONGEST);
  } catch {
    return []; // switched off, or not written by us
  }
}
