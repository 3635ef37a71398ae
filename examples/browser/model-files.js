/**
 * The files of an export, kept by the browser as one version.
 *
 * `manifest.json` names them with their hashes. A version is used when all of its files are here; until then, and when a file
 * cannot be had, the last complete one is.
 */

const CACHE = "delta-llava-model";

/**
 * @param {string} folder address of the export
 * @param {string} [dtype] the precision; by default the export's first
 * @param {function} onProgress called with the bytes that are here and those that are needed
 * @returns {Promise<{match: function, put: function}|null>} a cache for transformers.js; null where browsers keep nothing
 */
export async function openExport(folder, dtype, onProgress) {
  if (!self.caches || !crypto.subtle) return null;
  const cache = await caches.open(CACHE);
  const place = `${folder}/manifest.json?complete`;
  const last = await (await cache.match(place))?.json();
  const address = ({ path, sha256 }) => `${folder}/${path}?sha256=${sha256}`;
  const needed = (manifest) => manifest.files.filter((file) => [null, dtype ?? manifest.dtype].includes(file.dtype));
  let files;
  try {
    const manifest = await fetchManifest(folder);
    files = needed(manifest);
    const total = files.reduce((sum, { bytes }) => sum + bytes, 0);
    let here = 0;
    for (const file of files) {
      onProgress(here, total);
      if (!(await cache.match(address(file)))) await download(cache, address(file), file);
      here += file.bytes;
    }
    await cache.put(place, new Response(JSON.stringify(manifest)));
    const kept = new Set([place, ...manifest.files.map(address)]);
    for (const { url } of await cache.keys()) if (url.startsWith(`${folder}/`) && !kept.has(url)) await cache.delete(url);
  } catch (error) {
    if (error.name === "QuotaExceededError") return null;
    files = last && needed(last);
    const held = await Promise.all((files ?? []).map((file) => cache.match(address(file))));
    if (!files || held.includes(undefined)) throw error;
    console.warn(`The earlier version is used: ${error.message}`);
  }
  const addresses = new Map(files.map((file) => [new URL(`${folder}/${file.path}`).pathname, address(file)]));
  return { match: (path) => (addresses.has(path) ? cache.match(addresses.get(path)) : undefined), put: async () => {} };
}

async function fetchManifest(folder) {
  const response = await fetch(`${folder}/manifest.json`, { cache: "no-store" });
  if (!response.ok) throw new Error(`There is no export in ${folder.split("/").pop()}: see README.md.`);
  return response.json();
}

/** Store a file, if it has arrived whole. */
async function download(cache, address, { path, sha256 }) {
  const response = await fetch(address, { cache: "no-store" });
  if (!response.ok) throw new Error(`${path} did not load (${response.status}).`);
  const content = await response.arrayBuffer();
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  if ([...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("") !== sha256) {
    throw new Error(`${path} is not the file that the manifest names.`);
  }
  await cache.put(address, new Response(content, { headers: { "Content-Length": String(content.byteLength) } }));
}
