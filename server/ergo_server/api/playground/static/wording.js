// Numbers and reasons as people read them.

export const count = (number) => number.toLocaleString("en");

export const pixels = ({ width, height }) => `${width} × ${height}`;

export function time(ms) {
  if (ms < 0.1) return "< 0.1 ms";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

export function bytes(number) {
  if (number < 1000) return `${number} bytes`;
  if (number < 1e6) return `${Math.round(number / 1e3)} kB`;
  return `${(number / 1e6).toFixed(1)} MB`;
}

/** The saved share in words; never rounded up to all of it. */
export function saved(ratio) {
  if (ratio < 0) return `${Math.ceil(-100 * ratio)} % more`;
  const percent = ratio > 0.99 ? Math.floor(1000 * ratio) / 10 : Math.round(100 * ratio);
  return `${percent} % saved`;
}

const REASONS = {
  requested: "Zoom was switched off: the overview is all that the model saw.",
  fits_budget: "No zoom was needed: the image fits the budget at full resolution.",
  missing: "The model named no region, so it answered from the whole image.",
};

/** Why no region was zoomed into, in a sentence; empty where one was. */
export function whyNoZoom(region) {
  if (zoomedInto(region)) return region.outcome === "clamped" ? "A part of the region was outside the image." : "";
  return REASONS[region.reason] ?? "The model named a region that is none, so it answered from the whole image.";
}

export const zoomedInto = (region) => region.outcome === "zoomed" || region.outcome === "clamped";
