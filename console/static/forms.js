// Buttons: the answer is shown in the page. A pressed button cannot be pressed again until then.
import { replaceParts } from "./fragments.js";

export function answerForms() {
  document.addEventListener("submit", async (event) => {
    const form = event.target.closest("form[data-live-form]");
    if (!form) return;
    event.preventDefault();
    const buttons = form.querySelectorAll("button");
    const data = new URLSearchParams(new FormData(form));
    buttons.forEach((each) => { each.disabled = true; });
    form.querySelectorAll("input:not([type=hidden])").forEach((each) => { each.value = each.defaultValue; });
    try {
      const answer = await fetch(form.action, { method: "POST", body: data, headers: { Accept: "text/html" } });
      const type = answer.headers.get("Content-Type") ?? "";
      if (type.includes("html")) replaceParts(await answer.text(), ["banners", "live-part"]);
      else location.reload(); // the session has ended, or the form is too old
    } catch {
      buttons.forEach((each) => { each.disabled = false; });
    }
  });
  // A choice of a filter applies at once.
  document.getElementById("filters")?.addEventListener("change", (event) => {
    if (event.target.matches("select")) event.target.form.requestSubmit();
  });
}
