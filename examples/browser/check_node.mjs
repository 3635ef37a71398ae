/**
 * Ask the same code in Node, and compare token by token with answers from elsewhere.
 *
 *     node check_node.mjs FOLDER [DTYPE] < questions.json
 *
 * FOLDER is an export; questions.json a list of {image, question, num_visual_tokens, tokens}: the path of a file or null, the ids
 * that are expected. Prints {asked, equal, different}.
 */

import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { argv, stdin } from "node:process";
import * as transformers from "@huggingface/transformers";
import { DeltaLlava } from "./delta-llava.js";

transformers.env.allowRemoteModels = false;
const [, , folder, dtype] = argv;
const questions = JSON.parse(readFileSync(stdin.fd, "utf8"));
const model = await DeltaLlava.load(transformers, resolve(folder), { dtype });
const different = [];
for (const { image, question, num_visual_tokens, tokens: expected } of questions) {
  const raw = image && (await transformers.RawImage.read(image));
  const { text, tokens } = await model.ask(raw, question, num_visual_tokens, { maxNewTokens: expected.length });
  if (String(tokens) !== String(expected)) different.push({ image, question, num_visual_tokens, text, tokens, expected });
}
console.log(JSON.stringify({ asked: questions.length, equal: questions.length - different.length, different }));
