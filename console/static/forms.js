// Buttons: the answer is shown in the page. A pressed button cannot be pressed again until then.
import { replaceParts } from "./fragments.js";
import { refresh } from "./live.js";

export function answerForms() {
  document.addEventListener("submit", async (event) => {
    const form = event.target.closest("form[data-live-form]"); // whose fields may be called as its properties
    if (!form) return;
    event.preventDefault();
    const buttons = form.querySelectorAll("button");
    const data = new URLSearchParams(new FormData(form));
    buttons.forEach((each) => { each.disabled = true; });
    try {
      const answer = await fetch(form.getAttribute("action"), { method: "POST", body: data, headers: { Accept: "text/html" } });
      const text = await answer.text();
      if ((answer.headers.get("Content-Type") ?? "").includes("html")) replaceParts(text, ["banners", "answer", "live-part", "limits"], true);
      else show(form, JSON.parse(text).error.message);
    } catch (error) {
      show(form, `${error.message}`);
    } finally {
      buttons.forEach((each) => { each.disabled = false; });
    }
  });
  // A search and a choice of a filter apply at once.
  let typing;
  document.querySelector("#filters input[type=search]")?.addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      const filled = [...new FormData(event.target.form)].filter(([, value]) => value);
      history.replaceState(null, "", `?${new URLSearchParams(filled)}`);
      refresh();
    }, 300);
  });
  const fold = document.querySelector(".fold"); // shown on narrow screens
  fold?.addEventListener("click", () => fold.setAttribute("aria-expanded", fold.getAttribute("aria-expanded") !== "true"));
  document.getElementById("filters")?.addEventListener("change", (event) => {
    if (event.target.matches("select")) event.target.form.requestSubmit();
  });
}

// Shows why a form could not be sent, or was refused, beside its button.
function show(form, message) {
  const old = form.querySelector("[role=alert]");
  const note = old ?? Object.assign(document.createElement("small"), { role: "alert" });
  note.textContent = message;
  if (!old) form.append(note);
}
