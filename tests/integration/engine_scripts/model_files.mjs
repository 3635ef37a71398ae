// What `examples/browser/model-files.js` gives of an export whose server changes; server and cache are objects here. Prints each step.
import { createHash } from "node:crypto";

const FOLDER = "http://host/model";
const NAMES = ["config.json", "onnx/a.onnx", "onnx/a_q4.onnx"]; // the last is not needed
const kept = new Map();
const cache = {
  match: async (url) => kept.get(url)?.clone(),
  put: async (url, response) => void kept.set(url, response),
  keys: async () => [...kept.keys()].map((url) => ({ url })),
  delete: async (url) => kept.delete(url),
};
globalThis.self = globalThis;
globalThis.caches = { open: async () => cache };
const { openExport } = await import("../../../examples/browser/model-files.js");

/** Statuses and bodies of a server that has a version of the export, some files of which are broken. */
function version(number, broken = {}) {
  const bodies = Object.fromEntries(NAMES.map((name) => [name, `${name} ${number}`]));
  const dtypes = { "config.json": null, "onnx/a.onnx": "fp32", "onnx/a_q4.onnx": "q4" };
  const files = Object.entries(bodies).map(([path, body]) => {
    const sha256 = createHash("sha256").update(body).digest("hex");
    return { path, sha256, bytes: body.length, dtype: dtypes[path] };
  });
  const served = { ...bodies, "manifest.json": JSON.stringify({ dtype: "fp32", files }) };
  return { ...Object.fromEntries(Object.entries(served).map(([name, body]) => [name, [200, body]])), ...broken };
}

const steps = [];
async function step(server) {
  const fetched = [];
  globalThis.fetch = async (url) => {
    if (server === null) throw new TypeError("fetch failed");
    const name = url.slice(FOLDER.length + 1).split("?")[0];
    fetched.push(name);
    const [status, body] = server[name] ?? [404, ""];
    return new Response(body, { status });
  };
  const { match } = await openExport(FOLDER, undefined, () => {});
  const texts = await Promise.all(NAMES.slice(0, 2).map(async (name) => (await match(`/model/${name}`)).text()));
  steps.push({ texts, fetched, kept: kept.size });
}

console.warn = () => {};
await step(version(1));
await step(version(2, { "onnx/a.onnx": [503, ""] }));
await step(version(2, { "onnx/a.onnx": [200, "onnx/a.onnx 1"] }));
await step(version(2, { "onnx/a.onnx": [200, "onnx/a"] }));
await step(version(2));
await step(null);
await step(version(1));
await step({});
console.log(JSON.stringify(steps));
