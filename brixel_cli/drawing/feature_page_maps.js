'use strict';
// The maps of a page as numbers: decoding, similarities, regions and matches. Nothing in this file draws.
const page = JSON.parse(document.getElementById('data').textContent);
const K = page.offset.length;
const STRIDE = 4 * Math.ceil(K / 4); // of a vector in memory; zeros fill it up
const LEVELS = 4095; // a query is rounded to whole numbers up to this
const PAIR = 2 ** 27; // two dot products of whole numbers share a float64: each is below 64 * 127 * LEVELS < PAIR / 4
const NUM_MATCHES = 5;
const NEAR = 0.15; // of the side: a match on the pin's own image is farther away than this

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Int8Array(await new Response(stream).arrayBuffer());
}

// A map from its planes, K of height * width bytes. Locations lie in memory in pairs, each pair of bytes in one float64.
function decodeMap(planes, height, width) {
  const count = height * width, pairs = new Float64Array(Math.ceil(count / 2) * STRIDE), inverse = new Float64Array(count);
  for (let k = 0; k < K; k++) {
    const offset = page.offset[k], plane = planes.subarray(k * count, (k + 1) * count);
    for (let n = 0; n < count; n++) {
      pairs[(n >> 1) * STRIDE + k] += n & 1 ? plane[n] * PAIR : plane[n];
      inverse[n] += (plane[n] * page.step + offset) ** 2;
    }
  }
  for (let n = 0; n < count; n++) inverse[n] = 1 / (Math.sqrt(inverse[n]) || 1);
  return { height, width, planes, pairs, inverse, heat: new Float32Array(count), owner: new Uint8Array(count) };
}

function addVector(map, cell, sum) {
  const count = map.height * map.width;
  for (let k = 0; k < K; k++) sum[k] += (map.planes[k * count + cell] * page.step + page.offset[k]) * map.inverse[cell];
}

// A vector as it is multiplied with maps: whole numbers, what one of them stands for, and the product with the offset.
function queryFrom(vector) {
  const norm = Math.hypot(...vector) || 1, unit = vector.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / norm / LEVELS || 1;
  const whole = new Float64Array(STRIDE);
  let base = 0;
  for (let k = 0; k < K; k++) {
    whole[k] = Math.round(vector[k] / norm / unit);
    base += page.offset[k] * vector[k] / norm;
  }
  return { whole, scale: unit * page.step, base };
}

// Cosines of a query with all locations of a map: exact products of whole numbers, two locations at once.
function similarities(map, { whole, scale, base }, out) {
  const { pairs, inverse } = map;
  for (let n = 0, at = 0; n < out.length; n += 2) {
    let a = 0, b = 0, c = 0, d = 0; // four sums, which do not wait for each other
    for (let k = 0; k < STRIDE; k += 4, at += 4) {
      a += pairs[at] * whole[k];
      b += pairs[at + 1] * whole[k + 1];
      c += pairs[at + 2] * whole[k + 2];
      d += pairs[at + 3] * whole[k + 3];
    }
    const sum = a + b + c + d, second = Math.round(sum / PAIR);
    out[n] = ((sum - second * PAIR) * scale + base) * inverse[n];
    if (n + 1 < out.length) out[n + 1] = (second * scale + base) * inverse[n + 1];
  }
  return out;
}

const clampCell = (fraction, count) => Math.max(0, Math.min(count - 1, Math.floor(fraction * count)));
const cellOf = (map, point) => clampCell(point.y, map.height) * map.width + clampCell(point.x, map.width);

// The query of a point in one source: its location, or the mean of the connected region that is similar to it.
function queryOf(point, source) {
  point.queries ??= [];
  if (point.queries[source]) return point.queries[source];
  const map = cards[point.image].maps[source], cell = cellOf(map, point), sum = new Float64Array(K);
  addVector(map, cell, sum);
  if (point.region) {
    const heat = similarities(map, queryFrom(sum), new Float32Array(map.heat.length));
    const seen = new Set([cell]);
    for (const place of seen) { // a set may grow while it is walked
      if (place !== cell) addVector(map, place, sum);
      const x = place % map.width;
      const beside = [x > 0 ? place - 1 : -1, x < map.width - 1 ? place + 1 : -1, place - map.width, place + map.width];
      for (const next of beside) if (heat[next] >= point.region) seen.add(next); // undefined outside of the map
    }
  }
  point.queries[source] = queryFrom(sum);
  return point.queries[source];
}

// The heat map of some points: at each location the highest of their similarities, and whose that is.
function compute(map, source, points) {
  points.forEach((point, number) => {
    if (number) map.spare ??= new Float32Array(map.heat.length);
    const out = number ? map.spare : map.heat;
    similarities(map, queryOf(point, source), out);
    if (!number) map.owner.fill(0);
    else for (let n = 0; n < out.length; n++) if (out[n] > map.heat[n]) { map.heat[n] = out[n]; map.owner[n] = number; }
  });
}

// The best place of each image, of the pins' own images only those away from them; the best few over all images.
function findMatches(source, points) {
  const found = [];
  cards.forEach((card, image) => {
    const map = card.maps[source], own = points.filter((point) => point.image === image);
    let best = -1;
    for (let n = 0; n < map.heat.length; n++) {
      if (best >= 0 && map.heat[n] <= map.heat[best]) continue;
      const y = (Math.floor(n / map.width) + 0.5) / map.height, x = (n % map.width + 0.5) / map.width;
      if (!own.some((point) => Math.hypot(point.y - y, point.x - x) < NEAR)) best = n;
    }
    if (best >= 0) found.push({ image, value: map.heat[best], y: (Math.floor(best / map.width) + 0.5) / map.height, x: (best % map.width + 0.5) / map.width });
  });
  return found.sort((a, b) => b.value - a.value).slice(0, NUM_MATCHES);
}
