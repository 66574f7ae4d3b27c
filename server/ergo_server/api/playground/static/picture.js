// The image as the browser shows it, with the box on it. What is uploaded is the file, untouched.

const LONGEST_SIDE = 2048; // of what is kept for showing; a photograph of 108 megapixels decoded would take 432 MB
const THUMBNAIL = 112;
const HIGHEST = 0.55; // of the window's height, so that a part of what is below is seen, too

/** An image that was chosen. `size` is upright, in pixels; `bitmap` and `size` are null where the browser cannot show it. */
export class Picture {
  constructor(blob, name, size, bitmap) {
    Object.assign(this, { blob, name, size, bitmap });
  }

  static async open(blob, name) {
    const url = URL.createObjectURL(blob);
    try {
      const size = await sizeOf(url);
      const scale = Math.min(1, LONGEST_SIDE / Math.max(size.width, size.height));
      const bitmap = await createImageBitmap(blob, {
        imageOrientation: "from-image",
        resizeWidth: Math.max(1, Math.round(size.width * scale)),
        resizeHeight: Math.max(1, Math.round(size.height * scale)),
        resizeQuality: "high",
      });
      return new Picture(blob, name, size, bitmap);
    } catch {
      return new Picture(blob, name, null, null);
    } finally {
      URL.revokeObjectURL(url);
    }
  }

  /** A small copy as a data: URL, or "" where there is none. */
  thumbnail() {
    if (!this.bitmap) return "";
    const scale = Math.min(1, THUMBNAIL / Math.max(this.bitmap.width, this.bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(this.bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(this.bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(this.bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.7);
  }

  close() {
    this.bitmap?.close();
    this.bitmap = null;
  }
}

// From the header, orientation applied; nothing is decoded for it.
async function sizeOf(url) {
  const probe = new Image();
  await new Promise((resolve, reject) => Object.assign(probe, { onload: resolve, onerror: reject, src: url }));
  return { width: probe.naturalWidth, height: probe.naturalHeight };
}

/** Where the image is shown: as large as the frame allows, sharp on every display, with the box where it belongs. */
export class Stage {
  #picture = null;
  #box = null;

  constructor(frame, canvas) {
    this.frame = frame;
    this.canvas = canvas;
    new ResizeObserver(() => this.#draw()).observe(frame);
    window.addEventListener("resize", () => this.#draw());
  }

  /** Shows a picture; the box may be known before. */
  show(picture) {
    this.#picture = picture;
    this.#draw();
  }

  /** Shows nothing. */
  clear() {
    this.#box = null;
    this.show(null);
  }

  /** Draws a box, in pixels of the image; null takes it away. */
  mark(box) {
    this.#box = box;
    this.#draw();
  }

  #draw() {
    const { canvas } = this;
    canvas.hidden = !this.#picture?.bitmap;
    if (canvas.hidden) return;
    const { bitmap, size } = this.#picture;
    const highest = Math.max(200, HIGHEST * window.innerHeight);
    const scale = Math.min(1, this.frame.clientWidth / size.width, highest / size.height);
    const density = window.devicePixelRatio;
    canvas.width = Math.max(1, Math.round(size.width * scale * density));
    canvas.height = Math.max(1, Math.round(size.height * scale * density));
    canvas.style.width = `${canvas.width / density}px`;
    canvas.style.height = `${canvas.height / density}px`;
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const label = `The image, ${size.width} by ${size.height} pixels`;
    canvas.setAttribute("aria-label", this.#box ? `${label}; the model looked closer at ${words(this.#box)}` : label);
    if (this.#box) outline(context, this.#box, canvas.width / size.width, canvas.height / size.height, density);
  }
}

const words = ([x1, y1, x2, y2]) => `the region from ${x1}, ${y1} to ${x2}, ${y2}`;

// White between two black lines stands out on any picture; what is outside is dimmed a little. On whole pixels of the display,
// so that the lines are sharp: at most half of one beside the true edge.
function outline(context, box, scaleX, scaleY, density) {
  const { width, height } = context.canvas;
  const white = Math.round(3 * density);
  const black = white + 2 * Math.round(2 * density);
  const snap = (edge, limit) => {
    const at = white % 2 ? Math.floor(edge) + 0.5 : Math.round(edge);
    return Math.min(Math.max(at, white / 2), limit - white / 2);
  };
  const [x1, x2] = [box[0], box[2]].map((edge) => snap(edge * scaleX, width));
  const [y1, y2] = [box[1], box[3]].map((edge) => snap(edge * scaleY, height));
  context.beginPath();
  context.rect(0, 0, width, height);
  context.rect(x1, y1, x2 - x1, y2 - y1);
  context.fillStyle = "rgb(0 0 0 / 0.18)";
  context.fill("evenodd");
  for (const [colour, thickness] of [["#000", black], ["#fff", white]]) {
    context.strokeStyle = colour;
    context.lineWidth = thickness;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
  }
}
