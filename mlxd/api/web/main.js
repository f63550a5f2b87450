// The page's start: views by the address's fragment, the key, and the list of models.
// It does not know what is inside the views.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { StatusView } from "./status.js";

const VIEWS = ["chat", "status"];

const dialog = byId("key-dialog");
const api = new Api(sessionStorage, askForKey);
const chat = new Chat(api);
const status = new StatusView(api, loadModels);

function askForKey(problem) {
  if (problem || !dialog.open) setText(byId("key-problem"), problem);
  byId("change-key").hidden = true;
  if (!dialog.open) dialog.showModal();
}

async function loadModels() {
  const { data } = await api.json("v1/models");
  chat.showModels(data.map((model) => model.id));
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  api.key = byId("key").value;
  try {
    await loadModels();
  } catch (error) {
    setText(byId("key-problem"), error.message);
    byId("key").select();
    return;
  }
  byId("key").value = "";
  byId("change-key").hidden = false;
  dialog.close();
  status.failures = 0;
  status.poll();
});

byId("change-key").addEventListener("click", () => {
  setText(byId("key-problem"), "");
  dialog.showModal();
});

function showView() {
  const chosen = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : VIEWS[0];
  for (const name of VIEWS) byId(name).hidden = name !== chosen;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${chosen}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  status.watch(chosen === "status");
  if (chosen === "chat") byId("prompt").focus();
}

addEventListener("hashchange", showView);
byId("change-key").hidden = !api.key;
chat.showModels([]);
showView();
