// Renders chats with transformers.js' Jinja: reads [{template, context}, ...] from stdin, writes the texts or errors.
import { readFileSync } from "node:fs";
import { Template } from "@huggingface/jinja";

const cases = JSON.parse(readFileSync(0, "utf-8"));
const rendered = cases.map(({ template, context }) => {
  try {
    return new Template(template).render(context);
  } catch (error) {
    return `error: ${error.message}`;
  }
});
process.stdout.write(JSON.stringify(rendered));
