// Keys: / searches, g and then s or i opens a page, ? is left to the browser. None while typing.

export function handleKeys() {
  let isGoing = false;
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const root = document.body.dataset.root;
    if (isGoing) {
      isGoing = false;
      if (event.key === "s") location.assign(root);
      if (event.key === "i") location.assign(`${root}incidents`);
    } else if (event.key === "g") {
      isGoing = true;
      setTimeout(() => { isGoing = false; }, 1500);
    } else if (event.key === "/") {
      const search = document.querySelector("input[type=search]");
      if (search) { event.preventDefault(); search.focus(); search.select(); }
    }
  });
}
