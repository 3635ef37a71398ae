/**
 * Images as the Python processor prepares them: padded to a square with the mean colour, resized by Pillow's rules.
 *
 * transformers.js does not pad to a square, and resizes with the filter of the browser or of sharp. These two functions give
 * Pillow's bytes. An image is `{data, width, height}`, three bytes a pixel.
 */

/** `image` in the middle of a square of one `color`, [red, green, blue]. */
export function padToSquare({ data, width, height }, color) {
  const side = Math.max(width, height);
  const [left, top] = [Math.floor((side - width) / 2), Math.floor((side - height) / 2)];
  const square = new Uint8ClampedArray(side * side * 3).map((_, index) => color[index % 3]);
  for (let row = 0; row < height; ++row) {
    square.set(data.subarray(row * width * 3, (row + 1) * width * 3), ((top + row) * side + left) * 3);
  }
  return { data: square, width: side, height: side };
}

/** A square `image` resized to `size` pixels a side; `resample` is Pillow's number of a filter, a key of `FILTERS`. */
export function resizeSquare({ data, width }, size, resample) {
  if (width === size) return { data, width, height: width };
  const weights = resamplingWeights(width, size, resample);
  const columns = resampleRows(data, width, weights); // along the rows first, and bytes in between, as in Pillow
  return { data: resampleRows(columns, width, weights), width: size, height: size };
}

/** Radius of Pillow's filters, and their weight at a distance within it. */
const FILTERS = {
  1: [3, (x) => (x === 0 ? 1 : sinc(x) * sinc(x / 3))], // Lanczos
  2: [1, (x) => 1 - x], // bilinear
  3: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : (((x - 5) * x + 8) * x - 4) * -0.5)], // bicubic
};
const sinc = (x) => Math.sin(Math.PI * x) / (Math.PI * x);
const ONE = 2 ** 22; // weights are whole numbers of this fraction

/** For each pixel of a row that becomes `size` pixels long: the first old pixel in it, and the weights from there on. */
function resamplingWeights(width, size, resample) {
  const [radius, filter] = FILTERS[resample];
  const scale = width / size;
  const stretch = Math.max(scale, 1); // of the filter, where the row gets shorter
  return Array.from({ length: size }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - radius * stretch + 0.5));
    const end = Math.min(width, Math.trunc(center + radius * stretch + 0.5));
    const distances = Array.from({ length: end - first }, (_, offset) =>
      Math.abs((first + offset - center + 0.5) / stretch),
    );
    const values = distances.map((distance) => (distance < radius ? filter(distance) : 0));
    const sum = values.reduce((total, value) => total + value, 0);
    return { first, values: values.map((value) => Math.sign(value) * Math.round(Math.abs(value / sum) * ONE)) };
  });
}

/** All rows of `width` pixels resampled; the result is transposed, so that a second call does the columns. */
function resampleRows(data, width, weights) {
  const rows = data.length / width / 3;
  const result = new Uint8ClampedArray(weights.length * rows * 3);
  for (let row = 0; row < rows; ++row) {
    for (let index = 0; index < weights.length; ++index) {
      const { first, values } = weights[index];
      let [red, green, blue] = [ONE / 2, ONE / 2, ONE / 2]; // to round
      let position = (row * width + first) * 3;
      for (let tap = 0; tap < values.length; ++tap) {
        red += values[tap] * data[position++];
        green += values[tap] * data[position++];
        blue += values[tap] * data[position++];
      }
      result.set([Math.floor(red / ONE), Math.floor(green / ONE), Math.floor(blue / ONE)], (index * rows + row) * 3);
    }
  }
  return result;
}
