// The page: one question, one streamed answer, the box drawn the moment it is known.

const by = (id) => document.getElementById(id);
const SAMPLE = { url: "/static/scene.jpg", question: "What is the code on the red circle?" };
const LONGEST_SIDE = 640; // pixels of the preview; the upload itself is never shrunk

let bitmap = null;
let upload = null;

function say(text, isError = false) {
  by("status").textContent = text;
  by("status").classList.toggle("error", isError);
}

async function choose(blob) {
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    bitmap = upload = null;
    say("This browser cannot show that file as an image.", true);
    return;
  }
  upload = blob;
  by("result").hidden = false;
  by("crop-figure").hidden = true;
  by("answer").textContent = by("tokens").textContent = "";
  by("image-caption").textContent = `the image, ${bitmap.width} × ${bitmap.height}`;
  draw(null);
  say("");
}

function draw(box) {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = by("image");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (!box) return;
  const [x1, y1, x2, y2] = box.map((edge) => edge * scale);
  for (const [colour, width] of [["#000", 5], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
  }
}

// Yields {event, data} of a stream of server-sent events.
async function* events(body) {
  let text = "";
  for await (const piece of body.pipeThrough(new TextDecoderStream())) {
    text += piece;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s).slice(0, 2)));
      yield { event: lines.event, data: JSON.parse(lines.data) };
    }
  }
}

function show({ event, data }) {
  if (event === "region") {
    const zoomed = data.outcome === "zoomed" || data.outcome === "clamped";
    draw(zoomed ? data.box : null);
    if (data.crop?.data) {
      by("crop").src = data.crop.data;
      by("crop-figure").hidden = false;
    }
    say(zoomed ? "Looking closer …" : `No zoom: ${data.reason}. Answering from the whole image …`);
  } else if (event === "answer.delta") {
    by("answer").textContent += data.text;
  } else if (event === "done") {
    const tokens = data.visual_tokens;
    by("answer").textContent = data.answer;
    by("tokens").textContent =
      `${tokens.total} visual tokens instead of ${tokens.baseline} (${Math.round(100 * tokens.saved_ratio)} % saved), ` +
      `${Math.round(data.timings.total_ms)} ms`;
    say("");
  } else if (event === "error") {
    say(data.error.message, true);
  }
}

async function ask() {
  const form = new FormData();
  form.append("image", upload, "image");
  form.append("question", by("question").value);
  form.append("zoom", by("zoom").checked ? "auto" : "never");
  form.append("stream", "true");
  form.append("include", "crop");
  by("answer").textContent = by("tokens").textContent = "";
  by("crop-figure").hidden = true;
  draw(null);
  say("Looking at the whole …");
  const response = await fetch("/v1/vqa", { method: "POST", body: form });
  if (!response.ok) {
    say((await response.json()).error.message, true);
    return;
  }
  for await (const event of events(response.body)) show(event);
}

by("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!upload) return say("Choose an image first.", true);
  by("go").disabled = true;
  try {
    await ask();
  } catch (error) {
    say(`The server could not be reached (${error.message}).`, true);
  } finally {
    by("go").disabled = false;
  }
});
by("file").addEventListener("change", () => by("file").files.length && choose(by("file").files[0]));
by("sample").addEventListener("click", async () => {
  by("question").value = SAMPLE.question;
  await choose(await (await fetch(SAMPLE.url)).blob());
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) choose(event.clipboardData.files[0]);
});
