/** Delta-LLaVA by the stock classes of transformers.js. The same code runs in Node and in browsers. */

import { padAndResize, padToSquare } from "./square-image.js";

/** The ends of files' names by dtype. */
const SUFFIXES = { fp32: "", fp16: "_fp16", q8: "_quantized", q4: "_q4" };

export class DeltaLlava {
  /**
   * Load an export of `delta-llava export --format onnx`.
   *
   * @param {object} transformers what `import "@huggingface/transformers"` gives
   * @param {string} repo a folder in `transformers.env.localModelPath`, or a repo on the Hub
   * @param {object} options for `from_pretrained`: `dtype`, `device`, `progress_callback`
   */
  static async load(transformers, repo, options = {}) {
    const processor = await transformers.AutoProcessor.from_pretrained(repo, options);
    const model = await transformers.LlavaForConditionalGeneration.from_pretrained(repo, options);
    return new DeltaLlava(transformers, repo, processor, model);
  }

  constructor(transformers, repo, processor, model) {
    Object.assign(this, { transformers, repo, processor, model });
    this.stopping = new transformers.InterruptableStoppingCriteria();
    this.encodeImage = model.encode_image.bind(model); // for the default number of visual tokens
    this.encoder = null; // the vision encoder last used for another number
  }

  /** What the export says about itself: `vision_encoders` by number of visual tokens, `do_pad` and the like. */
  get settings() {
    return this.model.config.onnx_export;
  }

  /** Numbers of visual tokens that the export has, smallest first. */
  get visualTokenBudgets() {
    return Object.keys(this.settings.vision_encoders).map(Number);
  }

  /**
   * Answer a question.
   *
   * @param {RawImage|null} image of transformers.js; null for a question without an image
   * @param {string} question
   * @param {number} numVisualTokens one of `visualTokenBudgets`; ignored without an image
   * @param {object} options `maxNewTokens`, and `onText`, called with each piece of the answer
   * @returns {Promise<object>} `text`, `tokens` (their ids) and the milliseconds of `vision` (the image to visual tokens),
   *   `firstToken` (since the question was asked, vision included) and `rest` (all tokens after the first)
   */
  async ask(image, question, numVisualTokens, { maxNewTokens = 64, onText = () => {} } = {}) {
    const encodeImage = image && (await this.visionEncoder(numVisualTokens)); // its loading is not timed
    const start = performance.now();
    const tokens = [];
    const times = { vision: 0, firstToken: 0, rest: 0 };
    const inputs = this.tokenize(question, image ? numVisualTokens : 0);
    if (image) {
      inputs.pixel_values = await this.pixelValues(image);
      const visualTokens = await encodeImage(inputs.pixel_values);
      this.model.encode_image = () => visualTokens; // `generate` asks for them once
      times.vision = performance.now() - start;
    }
    const streamer = new this.transformers.TextStreamer(this.processor.tokenizer, {
      skip_prompt: true,
      callback_function: onText,
      token_callback_function: ([token]) => {
        times.firstToken ||= performance.now() - start;
        tokens.push(Number(token));
      },
    });
    this.stopping.reset();
    const options = { max_new_tokens: maxNewTokens, do_sample: false, stopping_criteria: this.stopping, streamer };
    await this.model.generate({ ...inputs, ...options });
    times.rest = performance.now() - start - times.firstToken;
    const text = this.processor.tokenizer.decode(tokens, { skip_special_tokens: true }).trim();
    return { text, tokens, times };
  }

  /** End the answer that is being generated. */
  stop() {
    this.stopping.interrupt();
  }

  /** The prompt's `input_ids` and `attention_mask`, with a placeholder for each visual token. */
  tokenize(question, numVisualTokens) {
    const { tokenizer } = this.processor;
    const { image_token } = this.processor.config;
    // A word, not an image.
    const text = question.replaceAll(image_token, image_token.replace("<", "< "));
    const content = [...(numVisualTokens ? [{ type: "image" }] : []), { type: "text", text }];
    const prompt = this.processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
    const placeholders = image_token.repeat(numVisualTokens);
    // The template has written the special tokens.
    return tokenizer(prompt.replace(image_token, placeholders), { add_special_tokens: false });
  }

  /** (1, 3, side, side), as the Python processor makes them. */
  async pixelValues(image) {
    const { image_processor } = this.processor;
    const { image_mean, do_resize, size, resample } = image_processor;
    if (this.settings.do_pad) {
      const color = (image_mean ?? [0, 0, 0]).map((mean) => Math.trunc(mean * 255));
      const rgb = image.rgb();
      const square = do_resize
        ? padAndResize(rgb, color, size.shortest_edge ?? size.height, resample)
        : padToSquare(rgb, color);
      image = new this.transformers.RawImage(square.data, square.width, square.height, 3);
    }
    return (await image_processor(image)).pixel_values;
  }

  /**
   * The function from pixel values to visual tokens, (1, number, hidden size).
   *
   * The stock class holds the encoder for the default number; of the others only the one used last stays in memory.
   */
  async visionEncoder(numVisualTokens) {
    const name = this.settings.vision_encoders[numVisualTokens];
    if (!name) throw new Error(`numVisualTokens=${numVisualTokens}: this export has ${this.visualTokenBudgets.join(", ")}.`);
    if (name === "vision_encoder") return (pixel_values) => this.encodeImage({ pixel_values });
    if (this.encoder?.name !== name) {
      await this.encoder?.graph.dispose();
      this.encoder = null; // also if the next one does not load
      this.encoder = { name, graph: await this.loadVisionEncoder(name) };
    }
    const { graph } = this.encoder;
    return async (pixel_values) => (await graph({ pixel_values })).image_features;
  }

  loadVisionEncoder(name) {
    const { dtype, device } = this.model.sessions.vision_encoder.config;
    return this.transformers.PreTrainedModel.from_pretrained(this.repo, {
      config: { ...this.model.config, model_type: "custom" }, // a graph of its own, without a class
      model_file_name: name,
      session_options: { externalData: this.sharedWeights(dtype) },
      dtype,
      device,
    });
  }

  /** The files of weights that all vision encoders of a dtype share: they are named after that for the default number. */
  sharedWeights(dtype) {
    const file = `vision_encoder${SUFFIXES[dtype]}.onnx`;
    const count = this.model.config["transformers.js_config"].use_external_data_format[file] ?? 0;
    const names = Array.from({ length: count }, (_, index) => `${file}_data${index ? `_${index}` : ""}`);
    return names.map((path) => ({ path, data: `onnx/${path}` }));
  }
}
