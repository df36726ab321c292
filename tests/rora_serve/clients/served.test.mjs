// What the official Node client gets from a real server at RORA_URL, with an adapter named "lora-8".
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const url = process.env.RORA_URL;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const model = "lora-8@latest";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, is_capital: { type: "boolean" } },
  required: ["city", "is_capital"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "look_up", strict: true, parameters } }];

const ask = (options) =>
  client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 16, ...options });

function checkArguments(text) {
  const found = JSON.parse(text);
  assert.deepEqual(Object.keys(found).sort(), ["city", "is_capital"]);
  assert.ok(["Paris", "Rome"].includes(found.city));
  assert.equal(typeof found.is_capital, "boolean");
}

async function requestsInFlight() {
  const page = await (await fetch(`${url}/metrics`)).text();
  return Number(page.match(/^rora_requests_in_flight (\S+)$/m)[1]);
}

test("models are listed and retrieved", async () => {
  const listed = [];
  for await (const card of client.models.list()) listed.push(card.id);
  assert.ok(listed.includes("lora-8"));
  assert.equal((await client.models.retrieve("lora-8")).id, "lora-8");
});

test("an answer names what was asked and counts its tokens", async () => {
  const { data, response } = await ask().withResponse();
  assert.equal(data.model, model);
  assert.match(response.headers.get("x-rora-adapter"), /^lora-8@sha256:[0-9a-f]{12}$/);
  const { prompt_tokens, completion_tokens, total_tokens } = data.usage;
  assert.equal(total_tokens, prompt_tokens + completion_tokens);
  assert.ok(prompt_tokens > 0);
  assert.ok(completion_tokens <= 16);
});

test("a stream adds up to the answer, with its usage last", async () => {
  const whole = await ask();
  const chunks = [];
  const stream = await ask({ stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) chunks.push(chunk);
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.ok(chunks.every((chunk) => chunk.model === model));
  const last = chunks.at(-1);
  assert.equal(last.choices.length, 0);
  assert.equal(last.usage.total_tokens, whole.usage.total_tokens);
});

test("log-probs, several choices, a seed and stops are heeded", async () => {
  const { choices: [greedy] } = await ask({ logprobs: true, top_logprobs: 2 });
  for (const { token, logprob, top_logprobs } of greedy.logprobs.content) {
    assert.equal(top_logprobs.length, 2);
    assert.deepEqual([top_logprobs[0].token, top_logprobs[0].logprob], [token, logprob]);
  }
  const sampled = async () =>
    (await ask({ n: 3, temperature: 1, seed: 7 })).choices.map((one) => one.message.content);
  const first = await sampled();
  assert.equal(new Set(first).size, 3);
  assert.deepEqual(await sampled(), first);
  const text = greedy.message.content;
  const stop = text.slice(8, 11);
  const { choices: [stopped] } = await ask({ stop });
  assert.equal(stopped.message.content, text.slice(0, text.indexOf(stop)));
  assert.equal(stopped.finish_reason, "stop");
});

test("a JSON schema is kept", async () => {
  const json_schema = { name: "place", strict: true, schema: parameters };
  const response_format = { type: "json_schema", json_schema };
  const answer = await ask({ response_format, max_tokens: 100 });
  checkArguments(answer.choices[0].message.content);
});

test("tools are called, and their answers taken", async () => {
  for (const tool_choice of ["required", { type: "function", function: { name: "look_up" } }]) {
    const answer = await ask({ tools, tool_choice, max_tokens: 200 });
    const { message } = answer.choices[0];
    assert.equal(message.tool_calls[0].function.name, "look_up");
    checkArguments(message.tool_calls[0].function.arguments);
    const results = message.tool_calls.map(({ id }) => ({
      role: "tool",
      tool_call_id: id,
      content: "found",
    }));
    const next = await ask({ messages: [...messages, message, ...results] });
    assert.ok(next.choices[0].message.content);
  }
});

test("the responses API answers, whole and as a stream", async () => {
  const asked = { model, input: "What is the capital of France?", temperature: 0 };
  const whole = await client.responses.create({ ...asked, max_output_tokens: 16 });
  assert.equal(whole.model, model);
  assert.ok(whole.output_text);
  const stream = await client.responses.create({ ...asked, max_output_tokens: 16, stream: true });
  let text = "";
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text, whole.output_text);
});

test("errors are those that the client knows", async () => {
  await assert.rejects(ask({ model: "nobody" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.match(error.message, /The model 'nobody' does not exist/);
    return true;
  });
  await assert.rejects(ask({ temperature: -1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.match(error.message, /temperature/);
    return true;
  });
});

test("a stream that is left ends on the server", async () => {
  const stream = await ask({ stream: true, max_tokens: 900, ignore_eos: true });
  for await (const chunk of stream) {
    assert.equal(chunk.model, model);
    assert.equal(await requestsInFlight(), 1);
    break;
  }
  const deadline = Date.now() + 5000; // of some 30 s that it would take
  while ((await requestsInFlight()) > 0) assert.ok(Date.now() < deadline);
});
