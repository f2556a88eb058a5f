// One question at a time, in a modal dialog: the browser keeps the focus inside and gives it back.

import { $ } from "./words.js";

/** Whether somebody said yes. Escape is no. */
export function confirmed(title, body, yes) {
  const dialog = $("dialog");
  $("dialog-title").textContent = title;
  $("dialog-body").replaceChildren(body);
  $("dialog-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
