// OpenAI's Node client against a onebase server: models, a reply, a stream, an error.
// Node 22 or newer:
//   npm ci && ONEBASE_URL=http://127.0.0.1:8000/v1 node chat.mjs [model]
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.ONEBASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.ONEBASE_API_KEY ?? "none",
});

const models = await client.models.list();
const model = process.argv[2] ?? models.data[0].id;
console.log("models:", models.data.map((each) => each.id).join(", "));

const messages = [{ role: "user", content: "Hi" }];
const reply = await client.chat.completions.create({ model, messages, max_tokens: 64, temperature: 0 });
console.log("reply:", reply.choices[0].message.content);

const stream = client.chat.completions.stream({ model, messages, max_tokens: 64, temperature: 0 });
process.stdout.write("stream: ");
stream.on("content", (piece) => process.stdout.write(piece));
const streamed = await stream.finalChatCompletion();
console.log(`\nfinish: ${streamed.choices[0].finish_reason}`);

try {
  await client.chat.completions.create({ model: "nobody", messages });
} catch (error) {
  if (!(error instanceof OpenAI.NotFoundError)) throw error;
  console.log("error:", error.status, error.code);
}
