// Renders chats as transformers.js does: reads [{template, context}, ...] from stdin, writes texts, or `error: ...`.
const { Template } = require("@huggingface/jinja");

const cases = JSON.parse(require("node:fs").readFileSync(0, "utf-8"));
const texts = cases.map(({ template, context }) => {
  try {
    return new Template(template).render(context);
  } catch (error) {
    return `error: ${error.message}`;
  }
});
process.stdout.write(JSON.stringify(texts));
