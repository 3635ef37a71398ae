/**
 * Images as the Python processor prepares them: padded to a square with the mean colour, resized by Pillow's rules.
 *
 * transformers.js does not pad to a square, and resizes with the filter of the browser or of sharp. These two functions give
 * Pillow's bytes. An image is `{data, width, height}`, three bytes a pixel.
 */

/** `image` in the middle of a square of one `color`, [red, green, blue]. */
export function padToSquare(image, color) {
  const side = Math.max(image.width, image.height);
  const square = new Uint8ClampedArray(side * side * 3);
  const line = paddedLines(image, color);
  for (let row = 0; row < side; ++row) square.set(line(row), row * side * 3);
  return { data: square, width: side, height: side };
}

/**
 * The same square resized to `size` pixels a side; `resample` is Pillow's number of a filter, a key of `FILTERS`.
 *
 * The square itself, which of a panorama takes gigabytes, is never made.
 */
export function padAndResize(image, color, size, resample) {
  const side = Math.max(image.width, image.height);
  if (side === size) return padToSquare(image, color);
  const weights = resamplingWeights(side, size, resample);
  const columns = resampleLines(paddedLines(image, color), side, weights); // along the rows first, bytes in between, as in Pillow
  const column = (index) => columns.subarray(index * side * 3, (index + 1) * side * 3);
  return { data: resampleLines(column, size, weights), width: size, height: size };
}

/** A function that gives the rows of the padded square; all empty ones are one array. */
function paddedLines({ data, width, height }, color) {
  const side = Math.max(width, height);
  const [left, top] = [Math.floor((side - width) / 2), Math.floor((side - height) / 2)];
  const empty = new Uint8ClampedArray(side * 3).map((_, index) => color[index % 3]);
  return (row) => {
    if (row < top || row >= top + height) return empty;
    const line = empty.slice();
    line.set(data.subarray((row - top) * width * 3, (row - top + 1) * width * 3), left * 3);
    return line;
  };
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

/** The rows 0 to `rows` that `line` gives, resampled; the result is transposed, so that a second call does the columns. */
function resampleLines(line, rows, weights) {
  const result = new Uint8ClampedArray(weights.length * rows * 3);
  let [before, pixels] = [null, null];
  for (let row = 0; row < rows; ++row) {
    const data = line(row);
    if (data !== before) pixels = resampleLine(data, weights);
    before = data;
    pixels.forEach((pixel, index) => result.set(pixel, (index * rows + row) * 3));
  }
  return result;
}

function resampleLine(data, weights) {
  return weights.map(({ first, values }) => {
    let [red, green, blue] = [ONE / 2, ONE / 2, ONE / 2]; // to round
    let position = first * 3;
    for (let tap = 0; tap < values.length; ++tap) {
      red += values[tap] * data[position++];
      green += values[tap] * data[position++];
      blue += values[tap] * data[position++];
    }
    return [Math.floor(red / ONE), Math.floor(green / ONE), Math.floor(blue / ONE)];
  });
}
