// A loop of tools with the official client, streamed and not; one line of JSON is its answer.
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 }); // from the environment
const tools = [
  { type: "function", function: { name: "look", parameters: { type: "object", properties: {} } } },
];
const messages = [{ role: "user", content: "find it" }];
const told = [];

for (let turn = 0; ; turn++) {
  const asked = { model: "policy", messages, tools };
  const answer =
    turn % 2 === 0
      ? await client.chat.completions.create(asked)
      : await client.chat.completions.stream(asked).finalChatCompletion();
  const { message } = answer.choices[0];
  told.push(message);
  messages.push(message);
  if (!message.tool_calls?.length) break;
  for (const call of message.tool_calls)
    messages.push({ role: "tool", tool_call_id: call.id, content: "a lamp" });
}

let refused = "";
try {
  await client.chat.completions.create({ model: "policy", messages, top_p: 0.5 });
} catch (error) {
  refused = error instanceof OpenAI.BadRequestError ? error.message : String(error);
}
console.log(JSON.stringify({ reward: 1, told, refused }));
