// Parts of a page that are replaced by those of a new answer. What the reader types into is left alone.

export function isEdited(part) {
  if (part.matches("[data-unsent]")) return true; // what was entered was refused, and is to be corrected
  const active = document.activeElement;
  const isTyping = part.contains(active) && active.matches("input:not([type=checkbox]), select, textarea");
  const fields = [...part.querySelectorAll("input:not([type=hidden]), textarea")];
  const isFilled = fields.some((each) => (each.type === "checkbox" ? each.checked !== each.defaultChecked : each.value !== each.defaultValue))
    || [...part.querySelectorAll("option")].some((each) => each.selected !== each.defaultSelected && each.parentElement.options[0] !== each);
  return isTyping || isFilled;
}

// `isAnswer`: the reader has pressed a button, and wants to see what came of it.
export function replaceParts(text, ids, isAnswer = false) {
  const page = new DOMParser().parseFromString(text, "text/html");
  for (const id of ids) {
    const old = document.getElementById(id);
    const fresh = page.getElementById(id);
    if (!old || !fresh || (!isAnswer && isEdited(old))) continue;
    const opened = [...old.querySelectorAll("details")].map((each) => each.open);
    if (fresh.dataset.keepsOrder && fresh.dataset.keepsOrder === old.dataset.keepsOrder) keepOrder(old, fresh);
    const focused = old.contains(document.activeElement) ? pathOf(document.activeElement, old) : null;
    old.replaceWith(fresh);
    fresh.querySelectorAll("details").forEach((each, index) => { each.open = opened[index] ?? each.open; });
    if (focused) fresh.querySelector(focused)?.focus();
  }
  document.title = page.title || document.title;
  if (page.body.dataset.version) document.body.dataset.version = page.body.dataset.version;
}

// Rows stay where they are, whatever their order is now: the reader may be about to press one. New ones are the last.
function keepOrder(old, fresh) {
  const places = new Map([...old.querySelectorAll("tbody tr")].map((row, place) => [row.id, place]));
  const placeOf = (row) => places.get(row.id) ?? places.size;
  for (const body of fresh.querySelectorAll("tbody")) body.append(...[...body.rows].sort((a, b) => placeOf(a) - placeOf(b)));
  fresh.querySelector(".order").replaceWith(old.querySelector(".order"));
}

function pathOf(element, root) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  const form = element.closest("form");
  if (form && root.contains(form)) return `form[action="${CSS.escape(form.getAttribute("action"))}"] ${element.localName}`;
  return element.getAttribute("href") ? `a[href="${CSS.escape(element.getAttribute("href"))}"]` : null;
}
