// One session of the Vercel AI SDK against the door: a tool that runs, a picture as a tool's result, a second turn.
// node ai_sdk.mjs URL PROVIDER PROMPT...; prints one JSON line per turn. Run in a folder that has node_modules.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, provider, ...prompts] = process.argv.slice(2);
const require = createRequire(`${process.cwd()}/package.json`);
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { isStepCount, stepCountIs, streamText, generateText, tool } = await load("ai");
const { z } = await load("zod");

const settings = { baseURL: `${url}/v1`, apiKey: "k" };
let model;
let providerOptions = {};
if (provider === "anthropic") {
  const { createAnthropic } = await load("@ai-sdk/anthropic");
  model = createAnthropic(settings)("antefix-tiny");
  providerOptions = { anthropic: { thinking: { type: "enabled", budgetTokens: 2000 } } };
} else if (provider === "openai") {
  const { createOpenAI } = await load("@ai-sdk/openai");
  model = createOpenAI(settings).responses("antefix-tiny");
  providerOptions = { openai: { store: false, include: ["reasoning.encrypted_content"], forceReasoning: true } };
} else if (provider === "openai-chat") {
  const { createOpenAI } = await load("@ai-sdk/openai");
  model = createOpenAI(settings).chat("antefix-tiny");
} else {
  const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
  model = createOpenAICompatible({ name: "antefix", includeUsage: true, ...settings })("antefix-tiny");
}

const tools = {
  run: tool({
    description: "Runs a command.",
    inputSchema: z.object({ command: z.string() }),
    execute: async ({ command }) => execFileSync("bash", ["-c", command], { encoding: "utf8" }),
  }),
  look: tool({
    description: "Looks at a picture.",
    inputSchema: z.object({ path: z.string() }),
    execute: async ({ path }) => readFileSync(path).toString("base64"),
    toModelOutput: ({ output }) => ({
      type: "content",
      value: [{ type: "file", mediaType: "image/png", data: { type: "data", data: output } }],
    }),
  }),
};

const messages = [];
for (const prompt of prompts) {
  messages.push({ role: "user", content: prompt });
  const stop = (isStepCount ?? stepCountIs)(8);
  const result = streamText({ model, messages, tools, providerOptions, stopWhen: stop, maxRetries: 0, maxOutputTokens: 4096,
    onError: ({ error }) => console.error(error) });
  let reasoning = "";
  for await (const part of result.fullStream) {
    if (part.type === "reasoning-delta") reasoning += part.text ?? part.delta ?? "";
  }
  const steps = await result.steps;
  messages.push(...(await result.responseMessages));
  const cached = steps.map((step) => step.usage.inputTokenDetails?.cacheReadTokens ?? step.usage.cachedInputTokens ?? 0);
  console.log(JSON.stringify({ text: await result.text, reasoning, cached, num_steps: steps.length }));
}
