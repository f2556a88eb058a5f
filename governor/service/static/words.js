// Figures and causes as a reader sees them, and small helpers for the document.

const COUNT = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });

export const count = (value) => COUNT.format(value);
/** A count and its noun: 1 launch, 2 launches. */
export const counted = (value, noun, ending = "s") => `${count(value)} ${noun}${value === 1 ? "" : ending}`;
export const percent = (ratio) => `${(100 * ratio).toFixed(ratio > 0 && ratio < 0.1 ? 1 : 0)} %`;

/** Seconds as people say them: 0.4 s, 42 s, 3 min 05 s, 2 h 10 min, 3 d 4 h. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "unknown";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** A count from runs, which may be a fraction. */
export const about = (value) => (value > 0 && value < 10 && value % 1 ? value.toFixed(1) : count(value));

const CAUSES = {
  concurrency: "a free slot (concurrency)",
  stagger: "the stagger",
  tpm: "tokens per minute",
  rpm: "requests per minute",
  day: "the daily limit",
  hold: "a hold after a 429",
  paused: "the end of a pause",
  backoff: "a backoff after a 429",
  stopped: "somebody to resume it",
  launching: "its turn",
};
export const cause = (name) => CAUSES[name] ?? name;

/** An element with attributes and children; texts are never read as HTML. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export const $ = (id) => document.getElementById(id);

/** Sets a text only where it is another, so that live regions speak of changes alone. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
