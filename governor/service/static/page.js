// The page: which view is shown (by the address after #), the connection, and the token.

import { token } from "./api.js";
import { startLive } from "./live.js";
import { openWhatIf, startWhatIf } from "./whatif.js";
import { $, say } from "./words.js";

const VIEWS = ["live", "what-if"];
const TITLES = { live: "Live", "what-if": "What if" };

async function route(isFirst) {
  const [name, query = ""] = location.hash.slice(1).split("?");
  const view = VIEWS.includes(name) ? name : "live";
  for (const each of VIEWS) {
    $(`${each}-view`).hidden = each !== view;
    if (each === view) $(`to-${each}`).setAttribute("aria-current", "page");
    else $(`to-${each}`).removeAttribute("aria-current");
  }
  document.title = `${TITLES[view]} – Paceline`;
  if (!isFirst) $("content").focus({ preventScroll: true });
  const found = new URLSearchParams(query);
  if (found.has("pool") && [...$("pool").options].some((each) => each.value === found.get("pool"))) $("pool").value = found.get("pool");
  if (view === "what-if") await openWhatIf(found);
}

function connection(error) {
  say($("connection"), error ? "Not connected" : "Connected");
  $("connection").classList.toggle("bad", Boolean(error));
  say($("trouble"), error ? `${error.message} What is shown may be old; trying again.` : "");
  $("trouble").hidden = !error;
}

function useToken(event) {
  event.preventDefault();
  token.set($("token").value.trim());
  $("token").value = "";
  $("token-box").open = false;
  document.dispatchEvent(new Event("token-changed"));
  route(true);
}

$("token-form").addEventListener("submit", useToken);
document.addEventListener("token-needed", () => ($("token-box").open = true));
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("content").focus();
});
window.addEventListener("hashchange", () => route(false));
startWhatIf();
startLive(connection);
document.addEventListener("batches-changed", () => route(true), { once: true });
if (!location.hash.startsWith("#what-if")) route(true);
