// The page: an image, a question, and watching it happen. What each part does is in its module; here they are wired.

import { hasKey, useKey } from "./api.js";
import { by, el } from "./dom.js";
import { History } from "./history.js";
import { Picture, Stage } from "./picture.js";
import { news, Result } from "./result.js";
import { SAMPLES } from "./samples.js";
import * as snippets from "./snippets.js";
import { Upload } from "./upload.js";
import { bytes, count, pixels, zoomedInto } from "./wording.js";

const INCLUDED = ["overview", "crop", "replies"];
const LOOKING = "Looking at the whole image …";

const stage = new Stage(by("stage"), by("image"));
const result = new Result();
const history = new History(by("history"), by("entries"), recall);
const images = new Map(); // of this visit, by the id of their entry in the history

let image = null; // {blob, name, sample, picture, upload} that was chosen
let asked = null; // {image, question} of the result that is shown
let running = null; // AbortController of the question under way

// --- what is said --------------------------------------------------------------------------------------------------------

function say(text, { unseen = false } = {}) {
  by("status").textContent = text;
  by("status").classList.toggle("unseen", unseen || !text);
  by("status").classList.toggle("busy", running !== null);
}

let countdown = null;

function settle() {
  clearInterval(countdown);
  by("error").hidden = by("key-form").hidden = true;
}

/** Shows what went wrong, and how to go on; `again` repeats it. */
function fail(error, again) {
  settle();
  say(error.name === "AbortError" && asked?.image === image ? "Stopped." : "");
  if (error.name === "AbortError") return;
  if (error.status === 401) return askForKey(again);
  const known = "status" in error;
  by("error-message").textContent = known ? error.message : "The page made a mistake. Please load it again.";
  by("error-request").textContent = error.requestId ?? "";
  by("error-request-line").hidden = !error.requestId;
  by("again").hidden = !error.passes;
  by("again").onclick = () => {
    settle();
    again();
  };
  wait(error.retryAfter ?? 0);
  by("error").hidden = false;
  by("error").scrollIntoView({ block: "nearest" });
  if (!known) console.error(error);
}

function wait(seconds) {
  const until = performance.now() + 1000 * seconds;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    by("again").disabled = left > 0;
    by("again").textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(countdown);
  };
  countdown = setInterval(tick, 250);
  tick();
}

function askForKey(again) {
  by("key-message").textContent = hasKey() ? "The server does not know this API key." : "This server asks for an API key.";
  by("key-form").hidden = false;
  by("key").value = "";
  by("key").focus();
  by("key-form").onsubmit = (event) => {
    event.preventDefault();
    const key = by("key").value.trim();
    if (!/^[!-~]+$/.test(key)) {
      by("key-message").textContent = "An API key has no spaces and no letters beyond ASCII.";
      return;
    }
    useKey(key);
    settle();
    again();
  };
}

// --- the image -----------------------------------------------------------------------------------------------------------

async function choose(blob, name, sample = null) {
  running?.abort();
  settle();
  say("");
  result.hide();
  image?.upload.forget();
  image?.picture?.close();
  stage.clear();
  const chosen = { blob, name, sample, size: null, picture: null, upload: new Upload(blob, (news) => image === chosen && showUpload(news)) };
  image = chosen;
  by("invitation").hidden = true;
  by("unshown").hidden = true;
  showFacts();
  send();
  const picture = await Picture.open(blob, name);
  if (image !== chosen) return picture.close();
  chosen.picture = picture;
  by("unshown").hidden = picture.bitmap !== null;
  stage.show(picture);
  showFacts(picture.size);
  const free = by("key-form").hidden && by("error").hidden; // who is asked for something else is not led away
  if (free && !by("question").value) by("question").focus({ preventScroll: true });
}

function send() {
  const sending = image;
  sending.upload.start().catch((error) => image === sending && !running && fail(error, send));
}

// The browser and the server each may be the first, or the only one, to know the size.
function showFacts(size) {
  image.size = size ?? image.size;
  const parts = [image.name, image.size && pixels(image.size), bytes(image.blob.size)];
  by("facts").textContent = parts.filter(Boolean).join(" · ");
}

function showUpload({ state, sent, total, info }) {
  by("sending").hidden = state !== "sending";
  if (state !== "sending" && running) say(LOOKING);
  if (state === "sending") {
    by("progress").value = total ? sent / total : 0;
    by("progress-text").textContent = `Uploading ${bytes(sent)} of ${bytes(total)}`;
  } else if (state === "kept") {
    showFacts(info);
  }
}

async function chooseSample(sample) {
  const response = await fetch(sample.path).catch(() => null);
  if (!response?.ok) return fail({ message: "The sample scene could not be loaded.", status: 0, passes: true }, () => chooseSample(sample));
  by("question").value = sample.question;
  await choose(await response.blob(), `${sample.name}.jpg`, sample);
}

// --- the question --------------------------------------------------------------------------------------------------------

async function ask() {
  const question = by("question").value.trim();
  if (!image) return missing("Choose an image first.", by("file"));
  if (!question) return missing("Type a question first.", by("question"));
  asked = { image, question };
  result.begin();
  stage.mark(null);
  showCode();
  await working(async (signal) => {
    await run(result.zoomed, "auto", signal);
    remember(result.zoomed.response);
    if (by("compare").checked) await run(result.single, "never", signal); // after it: neither slows the other down
  }, ask);
}

/** Asks what was asked again without zoom, where the answer with it is there already. */
async function askSingle() {
  await working((signal) => run(result.single, "never", signal), askSingle);
}

function missing(text, field) {
  settle();
  say(text);
  field.focus();
}

async function working(work, again) {
  settle();
  const controller = (running = new AbortController());
  by("go").textContent = "Stop";
  try {
    await work(controller.signal);
    const answers = [result.zoomed, result.single].filter((run) => run.response).map(spoken);
    by("go").textContent = "Ask";
    running = null;
    say(answers.join(" "), { unseen: true });
  } catch (error) {
    const mine = running === controller;
    if (mine) running = null;
    by("go").textContent = "Ask";
    result.zoomed.end();
    result.single.end();
    if (mine || error.name !== "AbortError") fail(error, again);
  }
}

async function run(shown, zoom, signal) {
  const { upload, picture } = asked.image;
  if (shown === result.single) shown.begin();
  say(!by("sending").hidden ? "Uploading the image …" : zoom === "never" ? "The same without zoom …" : LOOKING);
  const happened = (name, data) => {
    result.happened(shown, name, data);
    if (name === "overview" && zoom !== "never") say("Looking for the place …");
    if (name === "region" && shown === result.zoomed) stage.mark(zoomedInto(data) ? data.box : null);
    const text = news(name, data, picture?.size);
    if (text) say(text);
  };
  const sent = (done, total) => showUpload({ state: done < total ? "sending" : "sent", sent: done, total });
  const response = await upload.ask({ question: asked.question, zoom, include: INCLUDED }, { happened, sent, signal });
  result.done(shown, response);
}

const spoken = ({ title, response }) =>
  `${title}: ${response.answer}. ${count(response.visual_tokens.total)} visual tokens instead of ${count(response.visual_tokens.baseline)}.`;

// --- what was asked before, and how to ask it elsewhere -----------------------------------------------------------------------

function remember(response) {
  const id = response.id;
  images.set(id, { blob: asked.image.blob, name: asked.image.name });
  history.add({
    id,
    question: asked.question,
    answer: response.answer,
    name: asked.image.name,
    sample: asked.image.sample?.name ?? "",
    thumbnail: asked.image.picture?.thumbnail() ?? "",
    total: response.visual_tokens.total,
    baseline: response.visual_tokens.baseline,
  });
  for (const known of images.keys()) if (!history.entries.some((entry) => entry.id === known)) images.delete(known);
}

async function recall(entry) {
  const sample = SAMPLES.find(({ name }) => name === entry.sample);
  const known = images.get(entry.id);
  if (sample && image?.sample !== sample) await chooseSample(sample);
  else if (!sample && known && known.blob !== image?.blob) await choose(known.blob, known.name);
  else if (!sample && !known) say(`The page does not keep images: choose ${entry.name || "the image"} again.`);
  by("question").value = entry.question;
  by("question").focus();
}

function showCode() {
  const { name, sample } = asked.image;
  const facts = { origin: location.origin, name, sample: sample?.path ?? "", question: asked.question, key: hasKey() };
  by("curl").textContent = snippets.curl(facts);
  by("python").textContent = snippets.client(facts);
}

async function copy(block) {
  try {
    await navigator.clipboard.writeText(block.textContent);
    say("Copied.");
  } catch {
    // Browsers allow it to pages of https and of this machine only.
    getSelection().selectAllChildren(block);
    say("Selected: copy it with the keyboard.");
  }
}

// --- wiring --------------------------------------------------------------------------------------------------------------

by("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
by("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) ask();
});
by("compare").addEventListener("change", () => {
  const current = asked && asked.image === image && result.zoomed.response && asked.question === by("question").value.trim();
  if (!by("compare").checked && !running) result.dropSingle();
  else if (by("compare").checked && current && !running) askSingle();
});
by("file").addEventListener("change", () => {
  const [file] = by("file").files;
  by("file").value = ""; // choosing the same file again is a choice, too
  if (file) choose(file, file.name);
});
by("stage").addEventListener("click", () => image || by("file").click());
by("clear").addEventListener("click", () => {
  history.clear();
  images.clear();
  by("question").focus();
  say("The history is empty.");
});
for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", () => copy(by(button.dataset.copies)));
}
by("samples").append(
  ...SAMPLES.map((sample) => {
    const picture = el("img", { src: sample.small, alt: "", loading: "lazy" });
    const size = el("span", { class: "small" }, pixels(sample));
    const button = el("button", { type: "button", class: "sample", "aria-label": `Sample scene, ${pixels(sample)} pixels` }, picture, size);
    button.addEventListener("click", () => chooseSample(sample));
    return el("li", {}, button);
  }),
);

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
let inside = 0; // elements entered and not left: a drag over the page enters one before it leaves another
document.addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  inside += 1;
  by("veil").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!carriesFiles(event)) return;
  inside -= 1;
  by("veil").hidden = inside <= 0;
});
document.addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  inside = 0;
  by("veil").hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) choose(file, file.name);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (!file) return;
  event.preventDefault();
  choose(file, file.name || "image.png");
});
window.addEventListener("pagehide", () => image?.upload.forget());
