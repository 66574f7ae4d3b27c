// One image on its way to the server, and kept there: sent as soon as it is chosen, so that many questions cost one upload.

import * as api from "./api.js";

export class Upload {
  #stored = null; // of what the server says of the image, or of null where it does not keep it
  #until = 0;
  #controller = new AbortController();

  /** `told` learns of {state: "sending", sent, total}, {state: "kept", info}, {state: "not kept"}. */
  constructor(blob, told) {
    this.blob = blob;
    this.told = told;
  }

  /** Sends the image. Fails where the server refuses the image itself, or is not there. */
  start() {
    const sent = (done, total) => this.told({ state: "sending", sent: done, total });
    sent(0, this.blob.size);
    this.#stored = api.upload(this.blob, { sent, signal: this.#controller.signal }).then(
      (info) => {
        this.#until = performance.now() + 1000 * info.expires_in;
        this.told({ state: "kept", info });
        return info;
      },
      (error) => {
        this.#stored = null;
        this.told({ state: "not kept" });
        // It keeps no more images, or none at all: then the image goes with each question.
        if (error.status === 429 || error.status === 503) {
          this.#until = Infinity;
          this.#stored = Promise.resolve(null);
          return null;
        }
        throw error;
      },
    );
    return this.#stored;
  }

  /** Asks about the image: by its id, or with it. Sends it again where the server has forgotten it. */
  async ask(fields, options) {
    try {
      return await api.ask(await unlessStopped(this.#image(), options.signal), fields, options);
    } catch (error) {
      if (error.code !== "image_not_found") throw error;
      this.#stored = null;
      return api.ask(await unlessStopped(this.#image(), options.signal), fields, options);
    }
  }

  /** Stops sending, and has the server forget the image. */
  forget() {
    this.#controller.abort();
    this.#stored?.then(
      (info) => info && performance.now() < this.#until && api.forget(info.id),
      () => {},
    );
  }

  async #image() {
    let stored = await (this.#stored ?? this.start());
    if (stored && performance.now() > this.#until) stored = await this.start();
    return stored ? stored.id : this.blob;
  }
}

// The upload goes on when the question that waits for it is stopped.
function unlessStopped(work, signal) {
  return new Promise((resolve, reject) => {
    work.then(resolve, reject);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
