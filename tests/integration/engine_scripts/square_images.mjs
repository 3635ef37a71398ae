// Pads and resizes images as `examples/browser` does: a JSON list of {rgb (base64), width, height, color, size, resample} in, base64 out.
import { readFileSync } from "node:fs";
import { padAndResize } from "../../../examples/browser/square-image.js";

const cases = JSON.parse(readFileSync(0, "utf8"));
const results = cases.map(({ rgb, width, height, color, size, resample }) => {
  const image = { data: new Uint8ClampedArray(Buffer.from(rgb, "base64")), width, height };
  return Buffer.from(padAndResize(image, color, size, resample).data).toString("base64");
});
console.log(JSON.stringify(results));
