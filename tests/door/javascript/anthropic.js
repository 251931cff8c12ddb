// A loop of tools with the official client, streamed and not; one line of JSON is its answer.
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ maxRetries: 0 }); // from the environment
const tools = [
  { name: "look", description: "looks", input_schema: { type: "object", properties: {} } },
];
const asked = { model: "policy", max_tokens: 400, tools };
const messages = [{ role: "user", content: "find it" }];
const told = [];

for (let turn = 0; ; turn++) {
  const answer =
    turn % 2 === 0
      ? await client.messages.create({ ...asked, messages })
      : await client.messages.stream({ ...asked, messages }).finalMessage();
  told.push(answer.content);
  messages.push({ role: "assistant", content: answer.content });
  if (answer.stop_reason !== "tool_use") break;
  const results = answer.content
    .filter((block) => block.type === "tool_use")
    .map((block) => ({ type: "tool_result", tool_use_id: block.id, content: "a lamp" }));
  messages.push({ role: "user", content: results });
}

messages.push({ role: "user", content: "thanks" });
const count = await client.messages.countTokens({ model: "policy", tools, messages });
let refused = "";
try {
  await client.messages.create({ ...asked, messages, top_k: 5 });
} catch (error) {
  refused = error instanceof Anthropic.BadRequestError ? error.message : String(error);
}
console.log(JSON.stringify({ reward: 1, told, tokens: count.input_tokens, refused }));
