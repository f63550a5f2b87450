// One turn of the conversation on the page. It does not know where its text comes from.

import { copyButton, element, setText } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const SECONDS = 1000;

export function questionView(question) {
  return element(
    "li",
    { className: "turn user" },
    element("h3", { className: "who" }, "You"),
    element("div", { className: "text plain" }, question.content),
  );
}

/** An answer that grows: `show()` after every change. */
export class AnswerView {
  /** `onRegenerate()` and `onResults()` (the tools' results are filled in) are the buttons of the last answer. */
  constructor(answer, { onRegenerate, onResults }) {
    this.answer = answer;
    this.text = element("div", { className: "text" });
    this.markdown = new MarkdownView(this.text);
    this.thoughts = element("div", { className: "plain" });
    this.thinking = element("summary");
    this.reasoning = element("details", { className: "reasoning", hidden: true }, this.thinking, this.thoughts);
    this.calls = element("div", { className: "calls" });
    this.waiting = element("p", { className: "waiting" }, "Waiting for the first token");
    this.problem = element("p", { className: "problem", hidden: true });
    this.problem.setAttribute("role", "alert");
    this.facts = element("span", { className: "facts" });
    this.again = element("button", { type: "button", className: "quiet regenerate", textContent: "Regenerate" });
    this.again.addEventListener("click", onRegenerate);
    this.results = element("button", { type: "button", textContent: "Send results", hidden: true });
    this.results.addEventListener("click", onResults);
    const copy = copyButton(() => answer.content);
    this.foot = element("footer", { hidden: true }, this.facts, ...(copy ? [copy] : []), this.again);
    this.node = element(
      "li",
      { className: "turn assistant" },
      element("h3", { className: "who" }, "Model"),
      this.reasoning,
      this.waiting,
      this.text,
      this.calls,
      this.results,
      this.problem,
      this.foot,
    );
    this.show();
  }

  show() {
    const { content, reasoning, calls, error, endedAt } = this.answer;
    const isDone = endedAt !== null;
    this.node.setAttribute("aria-busy", String(!isDone));
    this.waiting.hidden = isDone || Boolean(content || reasoning || calls.length);
    this.reasoning.hidden = !reasoning;
    setText(this.thinking, isDone || content ? "Reasoning" : "Reasoning …");
    setText(this.thoughts, reasoning);
    this.markdown.show(content);
    calls.forEach((call, index) => this.showCall(call, index));
    setText(this.problem, error ? describe(error) : "");
    this.foot.hidden = !isDone;
    if (isDone) setText(this.facts, factsOf(this.answer));
    this.results.hidden = !isDone || !calls.length;
  }

  /** Only the last answer can be made anew or go on. */
  retire() {
    this.again.remove();
    this.results.remove();
    for (const field of this.calls.querySelectorAll("textarea")) field.readOnly = true;
  }

  showCall(call, index) {
    this.calls.children[index] ?? this.calls.append(callView(call));
    setText(this.calls.children[index].querySelector("pre"), pretty(call.arguments) || "{}");
  }
}

function callView(call) {
  const result = element("textarea", { rows: 2, placeholder: "What the tool gave back", spellcheck: false });
  result.addEventListener("input", () => (call.result = result.value));
  return element(
    "div",
    { className: "call" },
    element("h4", {}, "Tool call: ", element("code", {}, call.name)),
    element("pre", { tabIndex: 0 }),
    element("label", {}, "Result", result),
  );
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not complete yet
  }
}

function describe(error) {
  return error.requestId ? `${error.message} (request ${error.requestId})` : error.message;
}

function factsOf({ usage, firstAt, startedAt, endedAt, finishReason, stopped }) {
  const facts = [];
  if (usage) {
    const { prompt_tokens: asked, completion_tokens: made } = usage;
    facts.push(`${made} tokens`);
    if (made > 1 && endedAt > firstAt) facts.push(`${(((made - 1) * SECONDS) / (endedAt - firstAt)).toFixed(1)} tokens/s`);
    facts.push(`${usage.prompt_tokens_details?.cached_tokens ?? 0} of ${asked} prompt tokens cached`);
  }
  if (firstAt !== null) facts.push(`first token ${((firstAt - startedAt) / SECONDS).toFixed(2)} s`);
  if (finishReason === "length") facts.push("cut off at its token limit");
  if (stopped) facts.push("stopped");
  return facts.join(" · ");
}
