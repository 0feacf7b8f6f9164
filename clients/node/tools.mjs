// A tool call there and back by OpenAI's Node client: the model asks, this program looks, the model answers.
// Then the same call streamed, and by the Responses API.
// The model: an adapter, or a base whose chat template knows tools. Node 22 or newer:
//   npm ci && ONEBASE_URL=http://127.0.0.1:8000/v1 node tools.mjs MODEL ["What is the weather in Oslo?"]
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.ONEBASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.ONEBASE_API_KEY ?? "none",
});
const [model, question = "What is the weather in Oslo?"] = process.argv.slice(2);

const weather = {
  name: "weather",
  description: "The weather of a city.",
  parameters: {
    type: "object",
    properties: { city: { type: "string", enum: ["Oslo", "Rome"] } },
    required: ["city"],
    additionalProperties: false,
  },
};
const look = ({ city }) => JSON.stringify({ city, weather: city === "Oslo" ? "rain" : "sun" });

const tools = [{ type: "function", function: weather }];
// one call, demanded: leave both out, and the model decides
const demanded = { tools, tool_choice: "required", parallel_tool_calls: false };
const settings = { model, temperature: 0, max_tokens: 64 };

const messages = [{ role: "user", content: question }];
const asked = await client.chat.completions.create({ ...settings, ...demanded, messages });
const [{ message, finish_reason }] = asked.choices;
const [call] = message.tool_calls;
console.log("call:", call.function.name, call.function.arguments, finish_reason);

const result = look(JSON.parse(call.function.arguments));
messages.push(message, { role: "tool", tool_call_id: call.id, content: result });
const answer = await client.chat.completions.create({ ...settings, tools, tool_choice: "none", messages });
console.log("answer:", JSON.stringify(answer.choices[0].message.content));

const stream = client.chat.completions.stream({ ...settings, ...demanded, messages: messages.slice(0, 1) });
const streamed = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0];
console.log("streamed:", streamed.function.name, streamed.function.arguments);

const flat = { model, temperature: 0, max_output_tokens: 64, tools: [{ type: "function", strict: true, ...weather }] };
const response = await client.responses.create({
  ...flat, input: question, tool_choice: "required", parallel_tool_calls: false,
});
const item = response.output.find((each) => each.type === "function_call");
console.log("response:", item.name, item.arguments);
const output = { type: "function_call_output", call_id: item.call_id, output: look(JSON.parse(item.arguments)) };
const next = await client.responses.create({
  ...flat, input: [output], previous_response_id: response.id, tool_choice: "none",
});
console.log("next:", JSON.stringify(next.output_text));
