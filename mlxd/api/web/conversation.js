// A conversation: turns, the messages they make for the API, and how the chunks of a stream add up.
// It does not know the page or the network.

/** What the model says. */
export class Answer {
  role = "assistant";
  content = "";
  reasoning = "";
  /** [{id, name, arguments, result}]; the result is the user's to fill in */
  calls = [];
  finishReason = null;
  usage = null;
  /** an Error, or null */
  error = null;
  stopped = false;
  /** milliseconds */
  startedAt = null;
  firstAt = null;
  endedAt = null;

  constructor(now) {
    this.startedAt = now;
  }

  /** Take a chat.completion.chunk that came at `now`. */
  add(chunk, now) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { content, reasoning, tool_calls: calls } = choice.delta;
    if (this.firstAt === null && (content || reasoning || calls)) this.firstAt = now;
    this.content += content ?? "";
    this.reasoning += reasoning ?? "";
    for (const { index, id, function: part } of calls ?? []) {
      this.calls[index] ??= { id, name: part.name, arguments: "", result: "" };
      this.calls[index].arguments += part.arguments ?? "";
    }
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  get messages() {
    if (!this.calls.length) return this.content ? [{ role: "assistant", content: this.content }] : [];
    const calls = this.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
    const results = this.calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result }));
    return [{ role: "assistant", content: this.content || null, tool_calls: calls }, ...results];
  }
}

/** What the user says. */
export class Question {
  role = "user";

  constructor(content) {
    this.content = content;
  }

  get messages() {
    return [{ role: "user", content: this.content }];
  }
}

/** `turns` as the API takes them. */
export function messagesOf(system, turns) {
  const first = system ? [{ role: "system", content: system }] : [];
  return [...first, ...turns.flatMap((turn) => turn.messages)];
}
