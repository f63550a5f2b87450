// Building and finding elements. It does not know what they are for.
// Text becomes text nodes and nothing else, so nothing that a model writes is ever read as HTML.

/** The element of that id; a missing one is a mistake in index.html. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return found;
}

/** A new element; `properties` are those of the DOM, `children` nodes and strings. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

/** Show `text` in `target`, or hide it where there is none. Leaves it untouched where nothing changes. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
  target.hidden = text === "";
}

/** A button that copies what `text()` gives; null where the browser forbids copying (plain HTTP). */
export function copyButton(text) {
  if (!navigator.clipboard) return null;
  const button = element("button", { type: "button", className: "quiet", textContent: "Copy" });
  button.addEventListener("click", async () => {
    let said = "Copied";
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      said = "Not allowed";
    }
    button.textContent = said;
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}
