// Requests to the server: one way to send, one way to fail.

/** What went wrong, with what the caller can do about it. Status 0: there was no answer. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", requestId = "", retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }

  /** Whether the same request may succeed later. */
  get passes() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

const KEY = "ergo-vqa.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {} // storage is switched off: the key is then kept while the page is open

/** Sends this API key from now on. It is kept until the tab is closed, and never sent elsewhere. */
export function useKey(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {}
}

export const hasKey = () => key !== "";

/** Reads server-sent events from text that comes in pieces. */
class Events {
  #rest = "";

  *read(piece) {
    const blocks = (this.#rest + piece).split("\n\n");
    this.#rest = blocks.pop();
    for (const block of blocks) {
      const [, name, data] = block.match(/^event: (.*)\ndata: (.*)$/);
      yield { name, data: JSON.parse(data) };
    }
  }
}

// XMLHttpRequest, because fetch does not tell how much of a body has been sent.
function send(method, path, body, { type, sent, arrived, signal } = {}) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const request = new XMLHttpRequest();
    request.open(method, path);
    if (type) request.setRequestHeader("content-type", type);
    if (key) request.setRequestHeader("authorization", `Bearer ${key}`);
    let read = 0;
    const pass = () => {
      if (!arrived || request.status !== 200) return;
      const text = request.responseText.slice(read);
      read += text.length;
      try {
        arrived(text);
      } catch (error) {
        reject(error);
        request.abort();
      }
    };
    if (sent) request.upload.onprogress = (event) => sent(event.loaded, event.total);
    request.onprogress = pass;
    request.onload = () => {
      if (request.status >= 400) return reject(refusal(request));
      pass();
      resolve(request);
    };
    request.onerror = () => reject(read ? cutOff(request) : new ApiError("The server cannot be reached. Is it still running?"));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal?.addEventListener("abort", () => request.abort(), { once: true });
    request.send(body);
  });
}

const requestId = (request) => request.getResponseHeader("x-request-id") ?? "";

const cutOff = (request) =>
  new ApiError("The connection ended before the answer was complete.", { requestId: requestId(request) });

function refusal(request) {
  const seconds = Number.parseInt(request.getResponseHeader("retry-after"), 10);
  const more = { status: request.status, requestId: requestId(request), retryAfter: seconds >= 0 ? seconds : null };
  try {
    const { message, code } = JSON.parse(request.responseText).error;
    return new ApiError(sentence(message), { ...more, code });
  } catch {
    // Not from this server: a proxy in front of it.
    return new ApiError(`The server answered with status ${request.status} and gave no reason.`, more);
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** Uploads an image as it is; returns what the server says of it, `id` and `expires_in` included. */
export async function upload(image, { sent, signal }) {
  const request = await send("POST", "/v1/images", image, { type: "application/octet-stream", sent, signal });
  return JSON.parse(request.responseText);
}

/** Lets the server forget an upload. Whether it does is of no consequence: it will, in time. Outlives the page. */
export function forget(id) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  fetch(`/v1/images/${id}`, { method: "DELETE", keepalive: true, headers }).catch(() => {});
}

/** Asks. `image` is the id of an upload, or the image itself; `happened` is told of each event. Returns the whole response. */
export async function ask(image, fields, { happened, sent, signal }) {
  const events = new Events();
  let response = null;
  let failure = null;
  const arrived = (text) => {
    for (const { name, data } of events.read(text)) {
      if (name === "done") response = data;
      else if (name === "error") failure = data.error;
      else happened(name, data);
    }
  };
  const named = typeof image === "string";
  const all = { ...fields, image, stream: true };
  const options = { type: named ? "application/json" : null, sent: named ? null : sent, arrived, signal };
  const request = await send("POST", "/v1/vqa", named ? JSON.stringify(all) : form(all), options);
  if (failure) throw new ApiError(sentence(failure.message), { status: 500, code: failure.code, requestId: requestId(request) });
  if (!response) throw cutOff(request);
  return response;
}

function form(fields) {
  const made = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    for (const one of Array.isArray(value) ? value : [value]) made.append(name, one);
  }
  return made;
}
