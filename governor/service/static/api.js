// Asking the service: requests, the token, the stream of events. Nothing here knows what is shown.
//
// The token is kept in sessionStorage alone: it is gone with the tab. Events are read with fetch, not with
// EventSource, which cannot send a token.

const TOKEN = "paceline-token";
const RETRY_MS = 2000;

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (text) => (text ? sessionStorage.setItem(TOKEN, text) : sessionStorage.removeItem(TOKEN)),
};

/** What the service refused, or that it cannot be reached (status 0), in words. */
export class Refused extends Error {
  constructor(message, status, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function answered(path, { method = "GET", body, type = "application/json", signal } = {}) {
  const headers = {};
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  if (body !== undefined) headers["Content-Type"] = type;
  let answer;
  try {
    answer = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service cannot be reached. Is it running?", 0);
  }
  if (answer.ok) return answer;
  let found = {};
  try {
    found = (await answer.json()).error ?? {};
  } catch {
    // A proxy in between may answer with something else than JSON.
  }
  if (answer.status === 401) document.dispatchEvent(new Event("token-needed"));
  throw new Refused(found.message ?? `The service answered with status ${answer.status}.`, answer.status, found.code);
}

/** The JSON that a request is answered with; `Refused` otherwise. */
export async function ask(path, options = {}) {
  const given = options.json === undefined ? options : { ...options, body: JSON.stringify(options.json) };
  return (await answered(path, given)).json();
}

/** A click on a link to a file: followed as it is, or, where there is a token, fetched with it and kept as that file. */
export async function download(event) {
  if (!token.get()) return;
  event.preventDefault();
  const { href, download: name } = event.currentTarget;
  const content = URL.createObjectURL(await (await answered(href)).blob());
  const link = document.createElement("a");
  link.href = content;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(content), 60_000);
}

/** Calls `heard(name, content)` for each event, for ever; `state(error or null)` when the stream breaks or is back. */
export async function listen(path, heard, state) {
  for (;;) {
    try {
      const reader = (await answered(path)).body.pipeThrough(new TextDecoderStream()).getReader();
      state(null);
      await readEvents(reader, heard);
      state(new Refused("The service has closed the connection.", 0));
    } catch (error) {
      state(error instanceof Refused ? error : new Refused("The connection to the service broke.", 0));
    }
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, RETRY_MS);
      document.addEventListener("token-changed", () => (clearTimeout(timer), resolve()), { once: true });
    });
  }
}

async function readEvents(reader, heard) {
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const fields = Object.fromEntries(part.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data) heard(fields.event, JSON.parse(fields.data));
    }
  }
}
