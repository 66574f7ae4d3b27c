// The answers on the page, and what they cost: filled in while they arrive, complete when they are done.

import { by, el } from "./dom.js";
import { count, pixels, saved, time, whyNoZoom, zoomedInto } from "./wording.js";

const LONG_ANSWER = 28; // characters; longer ones are set smaller

const STAGES = [
  ["receive_ms", "Question received"],
  ["decode_ms", "Image decoded"],
  ["overview_ms", "Overview made"],
  ["zoom_turn_ms", "Zoom turn"],
  ["crop_ms", "Crop cut"],
  ["answer_turn_ms", "Answer turn"],
  ["total_ms", "Total"],
];

/** One answer: a card that fills while it streams. `response` is the whole of it, once it is there. */
class Run {
  constructor(card, title) {
    this.card = card;
    this.title = title;
    this.response = null;
  }

  part(name) {
    return this.card.querySelector(`.${name}`);
  }

  begin() {
    this.response = null;
    this.card.hidden = false;
    this.card.classList.add("busy");
    this.card.ariaBusy = "true";
    for (const name of ["thinking", "answer", "cost", "note"]) this.part(name).textContent = "";
    this.part("thinking").hidden = this.part("note").hidden = true;
  }

  end() {
    this.card.classList.remove("busy");
    this.card.ariaBusy = "false";
    this.part("thinking").hidden = true;
  }

  hide() {
    this.response = null;
    this.card.hidden = true;
  }

  happened(name, data) {
    if (name === "reasoning.delta") {
      this.part("thinking").hidden = false;
      this.part("thinking").textContent += data.text;
    } else if (name === "answer.delta") {
      this.#answer(this.part("answer").textContent + data.text);
    } else if (name === "region") {
      this.part("note").textContent = whyNoZoom(data);
      this.part("note").hidden = !this.part("note").textContent;
    }
  }

  done(response) {
    this.response = response;
    this.#answer(response.answer);
    const cut = response.finish_reason === "length" ? ", cut off at the longest allowed" : "";
    this.part("cost").textContent = `${count(response.visual_tokens.total)} visual tokens, ${time(response.timings.total_ms)}${cut}`;
    this.end();
  }

  #answer(text) {
    this.part("answer").textContent = text;
    this.part("answer").classList.toggle("long", text.length > LONG_ANSWER);
  }
}

export class Result {
  constructor() {
    this.zoomed = new Run(by("zoomed"), "With zoom");
    this.single = new Run(by("single"), "Without zoom");
  }

  /** Shows an empty result, about to be filled. */
  begin() {
    by("result").hidden = false;
    by("steps").hidden = true;
    this.single.hide();
    this.zoomed.begin();
    view("overview", null);
    view("crop", null);
    by("crop-figure").hidden = false;
    this.#fill();
  }

  hide() {
    by("result").hidden = true;
    this.zoomed.response = this.single.response = null;
  }

  /** Shows an event of a run. */
  happened(run, name, data) {
    run.happened(name, data);
    if (name === "overview") view("overview", data);
    if (name === "region" && run === this.zoomed) {
      view("crop", data.crop);
      by("crop-figure").hidden = !data.crop;
    }
  }

  /** Shows the whole response of a run. */
  done(run, response) {
    run.done(response);
    this.#fill();
  }

  /** Takes the answer without zoom away. */
  dropSingle() {
    this.single.hide();
    this.#fill();
  }

  #fill() {
    const runs = [this.zoomed, this.single].filter((run) => run.response);
    by("zoomed-title").textContent = this.single.card.hidden ? "Answer" : "With zoom";
    fillTokens(runs);
    fillTimings(runs);
    fillReplies(runs);
  }
}

function view(name, info) {
  const { width, height, data } = info ?? {};
  const image = by(name);
  image.hidden = !data;
  if (data) Object.assign(image, { src: data, width, height });
  else image.removeAttribute("src");
  by(`${name}-size`).textContent = data ? pixels({ width, height }) : "";
}

function fillTokens(runs) {
  by("saving").textContent = runs.length ? "" : "…";
  by("bars").replaceChildren();
  if (!runs.length) return;
  const sentences = runs.map(({ title, response: { visual_tokens: spent } }) => {
    const parts = spent.crop ? ` (${count(spent.overview)} overview + ${count(spent.crop)} crop)` : "";
    const sentence = `${count(spent.total)}${parts} instead of ${count(spent.baseline)}: ${saved(spent.saved_ratio)}`;
    return el("span", {}, runs.length > 1 ? `${title} ${sentence}. ` : `${sentence}. `);
  });
  by("saving").replaceChildren(...sentences);
  const { baseline } = runs[0].response.visual_tokens;
  const longest = Math.max(baseline, ...runs.map((run) => run.response.visual_tokens.total));
  const rows = runs.map(({ title, response: { visual_tokens: spent } }) =>
    bar(title, [["overview", spent.overview], ["crop", spent.crop]], spent.total, longest),
  );
  by("bars").append(...rows.flat(), ...bar("Baseline", [["baseline", baseline]], baseline, longest));
}

function bar(title, parts, total, longest) {
  const pieces = parts.filter(([, tokens]) => tokens).map(([kind, tokens]) => {
    const piece = el("span", { class: `piece ${kind}` });
    piece.style.width = `${(100 * tokens) / longest}%`;
    return piece;
  });
  return [
    el("span", { class: "bar-title small" }, title),
    el("span", { class: "bar" }, ...pieces),
    el("span", { class: "bar-total small" }, count(total)),
  ];
}

function fillTimings(runs) {
  const several = runs.length > 1;
  const shown = STAGES.filter(([stage]) => runs.some((run) => run.response.timings[stage] > 0));
  const stages = shown.filter(([stage]) => stage !== "total_ms");
  const longest = Math.max(...stages.flatMap(([stage]) => runs.map((run) => run.response.timings[stage])));
  const rows = shown.map(([stage, title]) => {
    const cells = runs.map((run) => {
      const ms = run.response.timings[stage];
      if (!ms) return el("td", {}, "–");
      const length = el("span", { class: "length", "aria-hidden": "true" });
      length.style.width = `${(100 * ms) / longest}%`;
      return el("td", {}, el("span", { class: "ms" }, time(ms)), el("span", { class: "track", "aria-hidden": "true" }, length));
    });
    return el("tr", { class: stage === "total_ms" ? "total" : "" }, el("th", { scope: "row" }, title), ...cells);
  });
  const titles = runs.map((run) => el("th", { scope: "col" }, several ? run.title : "Time"));
  const head = el("tr", { class: several ? "" : "unseen" }, el("th", { scope: "col" }, "Stage"), ...titles);
  by("timings").replaceChildren(...(runs.length ? [el("thead", {}, head), el("tbody", {}, ...rows)] : []));
}

function fillReplies(runs) {
  const blocks = runs.flatMap(({ title, response }) =>
    response.replies.map((reply, number) => {
      const turn = response.usage.turns[number].turn === "zoom" ? "zoom turn" : "answer turn";
      const name = runs.length > 1 ? `${title}, ${turn}` : sentenceCase(turn);
      const text = el("pre", { tabIndex: 0, role: "region", "aria-label": `${name}: raw reply` }, reply);
      return [el("h4", { class: "label" }, name), text];
    }),
  );
  by("replies-text").replaceChildren(...blocks.flat());
}

const sentenceCase = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** What happens, in a sentence; null where an event is no news. */
export function news(name, data, size) {
  if (name === "region" && zoomedInto(data)) {
    const [x1, y1, x2, y2] = data.box;
    const whole = size ? ` of ${pixels(size)}` : "";
    return `Looking closer, at ${pixels({ width: x2 - x1, height: y2 - y1 })}${whole} pixels …`;
  }
  return name === "region" ? "Answering from the whole image …" : null;
}
