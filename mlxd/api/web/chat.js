// The chat: the composer, the settings, and one answer at a time.
// It does not know how requests are sent (api.js) or how a turn looks (message.js).

import { ApiError } from "./api.js";
import { Answer, Question, messagesOf } from "./conversation.js";
import { byId } from "./dom.js";
import { AnswerView, questionView } from "./message.js";

const NEAR_THE_END = 80; // pixels within which the reader is taken to follow the text

export class Chat {
  constructor(api) {
    this.api = api;
    this.turns = [];
    this.view = null; // of the last answer
    this.running = null; // AbortController of the answer that is coming
    this.frame = 0;
    this.prompt = byId("prompt");
    this.log = byId("log");
    this.scroller = byId("scroller");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.ask();
      }
    });
    this.prompt.addEventListener("input", () => this.fitPrompt());
    byId("stop").addEventListener("click", () => this.stop());
    byId("chat").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    byId("new-chat").addEventListener("click", () => this.clear());
    byId("settings").open = matchMedia("(min-width: 60rem)").matches;
  }

  showModels(names) {
    const chosen = byId("model").value;
    byId("model").replaceChildren(...(names.length ? names : ["default"]).map((name) => new Option(name)));
    if (names.includes(chosen)) byId("model").value = chosen;
  }

  ask() {
    const text = this.prompt.value.trim();
    if (!text || this.running) return;
    this.prompt.value = "";
    this.fitPrompt();
    const question = new Question(text);
    this.turns.push(question);
    this.log.append(questionView(question));
    this.answer();
  }

  regenerate() {
    if (this.running) return;
    this.turns.pop();
    this.view.node.remove();
    this.answer();
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.view = null;
    this.log.replaceChildren();
    byId("hint").hidden = false;
    this.prompt.focus();
  }

  /** Send the conversation and show what comes back. */
  async answer() {
    const history = [...this.turns];
    const answer = new Answer(performance.now());
    this.view?.retire();
    const view = new AnswerView(answer, {
      onRegenerate: () => this.regenerate(),
      onResults: () => this.running || this.answer(),
    });
    this.view = view;
    this.turns.push(answer);
    this.log.append(view.node);
    byId("hint").hidden = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    const running = new AbortController();
    this.setRunning(running);
    try {
      const chunks = this.api.chat({ ...settings(), messages: messagesOf(byId("system").value, history) }, running.signal);
      for await (const chunk of chunks) {
        answer.add(chunk, performance.now());
        this.showSoon(view);
      }
    } catch (error) {
      if (running.signal.aborted) answer.stopped = true;
      else if (error instanceof ApiError) answer.error = error;
      else {
        answer.error = new ApiError(`This page has a fault: ${error.message}`);
        console.error(error);
      }
    } finally {
      answer.endedAt = performance.now();
      if (this.running === running) this.setRunning(null);
      this.show(view);
    }
  }

  setRunning(running) {
    const hadFocus = document.activeElement === byId(this.running ? "stop" : "send");
    this.running = running;
    byId("send").hidden = running !== null;
    byId("stop").hidden = running === null;
    if (hadFocus) this.prompt.focus();
  }

  /** At most once a frame, whatever the tokens' rate. */
  showSoon(view) {
    this.frame ||= requestAnimationFrame(() => this.show(view));
  }

  show(view) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    view.show();
    if (scrollHeight - scrollTop - clientHeight < NEAR_THE_END) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight + 2}px`;
  }
}

/** The request's fields beside its messages; what is left empty is the server's to choose. */
function settings() {
  const fields = { model: byId("model").value || "default" };
  const temperature = byId("temperature").value;
  const maxTokens = byId("max-tokens").value;
  const tools = byId("tools").value.trim();
  if (temperature) fields.temperature = Number(temperature);
  if (maxTokens) fields.max_tokens = Number(maxTokens);
  if (tools) {
    try {
      fields.tools = JSON.parse(tools);
    } catch (error) {
      throw new ApiError(`The tools are not JSON: ${error.message}`);
    }
  }
  return fields;
}
