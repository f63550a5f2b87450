// OpenAI's SDK for Node against mlxd: node openai_node.mjs FOLDER URL LIMITED_URL BUSY_URL
// FOLDER has the node_modules; the servers play given texts. Any failed assertion ends it with 1.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, url, limitedUrl, busyUrl] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/`)("openai").default;

const TEXT = "Plain “words”, 日本語, 🙂 and \\ back\"slashes\".\n";
const CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>';
const TOOL = { type: "function", function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } } };

const connect = (base, options = {}) => new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0, ...options });
const playing = (text, fields = {}) => ({
  model: "default",
  messages: [{ role: "user", content: `Say: <<<play>>>${text}<<<end>>>` }],
  ...fields,
});

const client = connect(url);
const whole = await client.chat.completions.create(playing(TEXT));
assert.equal(whole.choices[0].message.content, TEXT);
assert.equal(whole.choices[0].finish_reason, "stop");
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);

let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create(playing(TEXT, { stream: true, stream_options: { include_usage: true } }))) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, TEXT);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const accumulated = await client.chat.completions.stream(playing(`Look: ${CALL}`, { tools: [TOOL] })).finalChatCompletion();
const [call] = accumulated.choices[0].message.tool_calls;
assert.deepEqual([call.function.name, JSON.parse(call.function.arguments)], ["get_weather", { city: "Zürich" }]);
assert.equal(accumulated.choices[0].finish_reason, "tool_calls");

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.ok(models.length >= 1);

for (const stream of [false, true]) {
  await assert.rejects(client.chat.completions.create(playing("x", { temperature: 9, stream })), (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
  await assert.rejects(client.chat.completions.create(playing("x", { model: "gpt-17", stream })), OpenAI.NotFoundError);
}

const aborted = await connect(busyUrl).chat.completions.create(playing("x".repeat(500), { stream: true }));
for await (const _ of aborted) break; // leaving the loop aborts the request

const limited = connect(limitedUrl);
await assert.rejects(
  async () => {
    for (let i = 0; i < 200; i++) await limited.chat.completions.create(playing("x"));
  },
  (error) => error instanceof OpenAI.RateLimitError && Number(error.headers.get("retry-after")) >= 1,
);
assert.equal((await connect(limitedUrl, { maxRetries: 4 }).chat.completions.create(playing("in"))).choices[0].message.content, "in");

// Room for one that runs and one that waits: the others are told when to come again.
const crowd = (options) => Promise.allSettled(Array.from({ length: 4 }, () => connect(busyUrl, options).chat.completions.create(playing("x".repeat(50)))));
const impatient = await crowd({});
assert.ok(impatient.some(({ reason }) => reason instanceof OpenAI.InternalServerError && reason.status === 503));
assert.ok((await crowd({ maxRetries: 8 })).every(({ status }) => status === "fulfilled"));

console.log("openai for Node: ok");
