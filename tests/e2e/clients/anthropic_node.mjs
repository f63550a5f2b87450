// Anthropic's SDK for Node against mlxd: node anthropic_node.mjs FOLDER URL LIMITED_URL BUSY_URL
// FOLDER has the node_modules; the servers play given texts. Any failed assertion ends it with 1.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, url, limitedUrl, busyUrl] = process.argv.slice(2);
const Anthropic = createRequire(`${folder}/`)("@anthropic-ai/sdk").default;

const TEXT = "Plain “words”, 日本語, 🙂 and \\ back\"slashes\".\n";
const CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>';
const TOOL = { name: "get_weather", input_schema: { type: "object", properties: { city: { type: "string" } } } };

const connect = (base, options = {}) => new Anthropic({ baseURL: base, apiKey: "none", maxRetries: 0, ...options });
const playing = (text, fields = {}) => ({
  model: "default",
  max_tokens: 1000,
  messages: [{ role: "user", content: `Say: <<<play>>>${text}<<<end>>>` }],
  ...fields,
});

const client = connect(url);
const whole = await client.messages.create(playing(TEXT));
assert.deepEqual(whole.content, [{ type: "text", text: TEXT }]);
assert.equal(whole.stop_reason, "end_turn");

let heard = "";
const stream = client.messages.stream(playing(TEXT)).on("text", (text) => (heard += text));
const final = await stream.finalMessage();
assert.equal(heard, TEXT);
assert.deepEqual([final.content[0].text, final.usage.output_tokens], [TEXT, whole.usage.output_tokens]);

const { max_tokens, ...counted } = playing(TEXT);
assert.equal((await client.messages.countTokens(counted)).input_tokens, whole.usage.input_tokens);

const used = await client.messages.stream(playing(`Look. ${CALL}`, { tools: [TOOL] })).finalMessage();
const [said, call] = used.content;
assert.deepEqual([said.type, call.name, call.input, used.stop_reason], ["text", "get_weather", { city: "Zürich" }, "tool_use"]);
const history = [
  ...playing("").messages,
  { role: "assistant", content: used.content },
  { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "sunny" }, { type: "text", text: "<<<play>>>Sunny.<<<end>>>" }] },
];
assert.equal((await client.messages.create(playing("", { messages: history, tools: [TOOL] }))).content[0].text, "Sunny.");

const stopped = await client.messages.create(playing("one two three", { stop_sequences: ["two"] }));
assert.deepEqual([stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence], ["one ", "stop_sequence", "two"]);

for (const stream of [false, true]) {
  await assert.rejects(client.messages.create(playing("x", { temperature: 9, stream })), Anthropic.BadRequestError);
  await assert.rejects(client.messages.create(playing("x", { model: "claude-17", stream })), Anthropic.NotFoundError);
}

const aborted = connect(busyUrl).messages.stream(playing("x".repeat(500)));
aborted.on("text", () => aborted.abort());
await assert.rejects(aborted.done(), Anthropic.APIUserAbortError);

const limited = connect(limitedUrl);
await assert.rejects(
  async () => {
    for (let i = 0; i < 200; i++) await limited.messages.create(playing("x"));
  },
  (error) => error instanceof Anthropic.RateLimitError && Number(error.headers.get("retry-after")) >= 1,
);
assert.equal((await connect(limitedUrl, { maxRetries: 4 }).messages.create(playing("in"))).content[0].text, "in");

// Room for one that runs and one that waits: the others are told when to come again.
const crowd = (options) => Promise.allSettled(Array.from({ length: 4 }, () => connect(busyUrl, options).messages.create(playing("x".repeat(50)))));
const impatient = await crowd({});
assert.ok(impatient.some(({ reason }) => reason instanceof Anthropic.InternalServerError && reason.status === 529));
assert.ok((await crowd({ maxRetries: 8 })).every(({ status }) => status === "fulfilled"));

console.log("anthropic for Node: ok");
