/**
 * The model, in a thread of its own. Messages in: load, image, ask, stop. Out: progress, ready, image, text, answer, error. Each
 * answer to `image` and `ask` has their `turn`.
 */

import * as transformers from "./node_modules/@huggingface/transformers/dist/transformers.min.js";
import { DeltaLlava } from "./delta-llava.js";
import { openExport } from "./model-files.js";

const { env, RawImage } = transformers;
const here = (path) => new URL(path, import.meta.url);
env.allowRemoteModels = false; // every file comes from this folder
env.allowLocalModels = true;
env.localModelPath = here("./").pathname; // a URL with a host would count as remote
env.useBrowserCache = env.useWasmCache = false;

let model;
let image = null;

const ACTIONS = {
  async load({ repo, dtype, device }) {
    const onProgress = (bytes, total) => postMessage({ type: "progress", percent: (100 * bytes) / total, total });
    env.customCache = await openExport(here(repo).href, dtype, onProgress);
    env.useCustomCache = env.customCache !== null;
    device ??= (await navigator.gpu?.requestAdapter()) ? "webgpu" : "wasm";
    const runtime = `node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded${device === "webgpu" ? ".asyncify" : ""}`;
    env.backends.onnx.wasm.wasmPaths = { mjs: here(`${runtime}.mjs`).href, wasm: here(`${runtime}.wasm`).href };
    model = await DeltaLlava.load(transformers, repo, { dtype, device });
    breatheBetweenTokens(model.model);
    const { visualTokenBudgets, settings } = model;
    postMessage({ type: "ready", device, visualTokenBudgets, numVisualTokens: settings.num_visual_tokens });
  },

  /** Decode a file: turned as its EXIF tag says, without colour management, as the Python processor does. */
  async image({ file, turn }) {
    image = null;
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
      throw new Error(`${file.name} cannot be read as an image.`);
    });
    const { width, height } = bitmap;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.drawImage(bitmap, 0, 0);
    image = new RawImage(context.getImageData(0, 0, width, height).data, width, height, 4).rgb();
    postMessage({ type: "image", turn, width, height });
  },

  async ask({ question, numVisualTokens, turn }) {
    const onText = (text) => postMessage({ type: "text", turn, text });
    const answer = await model.ask(image, question, numVisualTokens, { onText });
    postMessage({ type: "answer", turn, numVisualTokens, ...answer });
  },
};

/** Before each token this thread reads its messages, `stop` among them. */
function breatheBetweenTokens(model) {
  const forward = model.forward.bind(model);
  model.forward = async (inputs) => {
    await new Promise((resolve) => setTimeout(resolve));
    return forward(inputs);
  };
}

let last = Promise.resolve();

self.onmessage = ({ data: { type, ...values } }) => {
  if (type === "stop") return model?.stop(); // it may still be loading
  // One after the other: a question is about the image that came before it.
  last = last.then(() => ACTIONS[type](values)).catch(({ message }) => postMessage({ type: "error", turn: values.turn, message }));
};
