// OpenAI's fine-tuning loop, unchanged, against a onebase server: upload, create, follow, chat with the new model.
// Node 22 or newer:
//   npm ci && ONEBASE_URL=http://127.0.0.1:8000/v1 node fine_tune.mjs train.jsonl ["How do I cook rice?"]
import fs from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.ONEBASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.ONEBASE_API_KEY ?? "none",
});
const [path, question = "How do I cook rice?"] = process.argv.slice(2);

const file = await client.files.create({ file: fs.createReadStream(path), purpose: "fine-tune" });
console.log("file:", file.id, file.status);

const base = (await client.models.list()).data[0].id;
let job = await client.fineTuning.jobs.create({
  model: base,
  training_file: file.id,
  suffix: "from node",
  seed: 7,
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: Number(process.env.EPOCHS ?? 3) } } },
});
console.log("job:", job.id, job.status);

const told = new Set();
async function tellNews() {
  const events = [];
  for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 10 })) events.unshift(event);
  for (const event of events.filter((each) => !told.has(each.id))) {
    told.add(event.id);
    console.log("event:", event.message);
  }
}

while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  await sleep(500);
  job = await client.fineTuning.jobs.retrieve(job.id);
  await tellNews();
}
console.log("status:", job.status, job.error?.message ?? "");
if (job.status !== "succeeded") process.exit(1);

const [checkpoint] = (await client.fineTuning.jobs.checkpoints.list(job.id)).data;
console.log("checkpoint:", checkpoint?.fine_tuned_model_checkpoint ?? "none");
const results = await client.files.content(job.result_files[0]);
console.log("results:", (await results.text()).split("\n")[0]);

const messages = [{ role: "user", content: question }];
const reply = await client.chat.completions.create({
  model: job.fine_tuned_model, messages, max_tokens: 40, temperature: 0,
});
console.log("model:", reply.model);
console.log("answer:", reply.choices[0].message.content);
