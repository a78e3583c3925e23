// Buttons that copy the text beside them.
export function copyTexts() {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy] button");
    if (!button) return;
    const text = button.closest("[data-copy]").querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = button.dataset.done;
    } catch { // pages without TLS may not: the text is selected instead
      getSelection().selectAllChildren(text);
    }
  });
}
