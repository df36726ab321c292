// What the official Node client makes of refusals, at RORA_URL, with keys of tenants in KEYS.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const { acme, tired } = JSON.parse(process.env.KEYS);

function ask(apiKey, model) {
  const client = new OpenAI({ baseURL: `${process.env.RORA_URL}/v1`, apiKey, maxRetries: 0 });
  const messages = [{ role: "user", content: "Hi" }];
  return client.chat.completions.create({ model, messages });
}

test("a key that nobody has", async () => {
  await assert.rejects(ask("rora-wrong", "base"), (error) => {
    assert.ok(error instanceof OpenAI.AuthenticationError);
    assert.equal(error.code, "invalid_api_key");
    assert.match(error.message, /A key is expected/);
    return true;
  });
});

test("an adapter of another tenant", async () => {
  await assert.rejects(ask(acme, "other"), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.match(error.message, /The model 'other' does not exist/);
    return true;
  });
});

test("a limit that is reached", async () => {
  await assert.rejects(ask(tired, "base"), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError);
    assert.equal(error.code, "rate_limit_exceeded");
    const seconds = Number(error.headers.get("retry-after"));
    assert.ok(seconds >= 1 && seconds <= 60);
    return true;
  });
});
