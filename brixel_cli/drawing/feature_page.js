'use strict';
// Maps are decoded once into unit vectors; then each frame computes similarities to the pins, or to the point, and draws.
const page = JSON.parse(document.getElementById('data').textContent);
const K = page.offset.length;
const STRIDE = 4 * Math.ceil(K / 4); // of a vector in memory; zeros fill it up
const NUM_MATCHES = 5;
const REGION = 0.6; // of a region's similarity where the mask is off
const NEAR = 0.15; // of the side: a match on the pin's own image is farther away than this
const PINS = [[23, 105, 210], [194, 65, 45], [31, 138, 91], [217, 178, 95], [171, 139, 234], [76, 195, 214], [238, 124, 184]];
const ANCHORS = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
const RAMP = Array.from({ length: 256 }, (_, index) => {
  const at = (index / 255) * (ANCHORS.length - 1), left = Math.min(Math.floor(at), ANCHORS.length - 2);
  return ANCHORS[left].map((from, c) => Math.round(from + (at - left) * (ANCHORS[left + 1][c] - from)));
});

const element = (id) => document.getElementById(id);
const make = (tag, name, text = '') => Object.assign(document.createElement(tag), { className: name, textContent: text });
const state = { pins: [], point: null, components: 0, threshold: 0, matches: true, dirty: true, colours: true };
const cards = []; // of each image: its elements, and its maps source by source

// ---- data

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Int8Array(await new Response(stream).arrayBuffer());
}

function decodeMap(planes, height, width) {
  const count = height * width, vectors = new Float32Array(count * STRIDE);
  for (let n = 0; n < count; n++) {
    let squares = 0;
    for (let k = 0; k < K; k++) {
      const value = planes[k * count + n] * page.step + page.offset[k];
      vectors[n * STRIDE + k] = value;
      squares += value * value;
    }
    const norm = Math.sqrt(squares) || 1;
    for (let k = 0; k < K; k++) vectors[n * STRIDE + k] /= norm;
  }
  return { height, width, planes, vectors, heat: new Float32Array(count), owner: new Uint8Array(count) };
}

function similarities(map, query, out) {
  const { vectors } = map;
  for (let n = 0, at = 0; n < out.length; n++) {
    let a = 0, b = 0, c = 0, d = 0; // four sums, which do not wait for each other
    for (let k = 0; k < STRIDE; k += 4, at += 4) {
      a += vectors[at] * query[k];
      b += vectors[at + 1] * query[k + 1];
      c += vectors[at + 2] * query[k + 2];
      d += vectors[at + 3] * query[k + 3];
    }
    out[n] = a + b + c + d;
  }
  return out;
}

const clampCell = (fraction, count) => Math.max(0, Math.min(count - 1, Math.floor(fraction * count)));
const cellOf = (map, point) => clampCell(point.y, map.height) * map.width + clampCell(point.x, map.width);

// The feature vector of a point in one source: of its place, or the mean of the connected region that is similar to it.
function queryOf(point, source) {
  point.queries ??= [];
  if (point.queries[source]) return point.queries[source];
  const map = cards[point.image].maps[source], cell = cellOf(map, point);
  let query = map.vectors.slice(cell * STRIDE, (cell + 1) * STRIDE);
  if (point.region) {
    const heat = similarities(map, query, new Float32Array(map.heat.length)), sum = new Float64Array(STRIDE);
    const seen = new Set([cell]);
    for (const place of seen) { // a set may grow while it is walked
      for (let k = 0; k < K; k++) sum[k] += map.vectors[place * STRIDE + k];
      const x = place % map.width;
      const beside = [x > 0 ? place - 1 : -1, x < map.width - 1 ? place + 1 : -1, place - map.width, place + map.width];
      for (const next of beside) if (heat[next] >= point.region) seen.add(next); // undefined outside of the map
    }
    const norm = Math.hypot(...sum) || 1;
    query = Float32Array.from(sum, (value) => value / norm);
  }
  return (point.queries[source] = query);
}

// ---- drawing

function paint(canvas, map, colour) {
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(map.width, map.height);
  for (let n = 0; n < map.heat.length; n++) colour(n, pixels.data, 4 * n);
  context.putImageData(pixels, 0, 0);
}

function paintColours(view) {
  const { map } = view, count = map.heat.length;
  paint(view.canvas, map, (n, data, at) => {
    for (let c = 0; c < 3; c++) {
      const k = Math.min(1 + 3 * state.components + c, K - 1);
      data[at + c] = 255 * (map.planes[k * count + n] - page.low[k]) / (page.high[k] - page.low[k] || 1);
    }
    data[at + 3] = 255;
  });
}

function paintHeat(view, several) {
  const { map } = view;
  paint(view.canvas, map, (n, data, at) => {
    const value = map.heat[n];
    if (state.threshold && value < state.threshold) return;
    const index = Math.round(255 * Math.max(0, Math.min(1, (value - page.floor) / (1 - page.floor))));
    const colour = several ? PINS[map.owner[n] % PINS.length] : RAMP[index];
    for (let c = 0; c < 3; c++) data[at + c] = colour[c];
    data[at + 3] = several ? index : 255;
  });
}

function paintOutline(view) {
  const { map, line } = view, { height, width, heat } = map, inside = (y, x) => heat[y * width + x] >= state.threshold;
  const scale = Math.max(1, Math.round(384 / width));
  if (!state.threshold && !line.width) return;
  line.width = state.threshold ? width * scale : 0; // this clears it
  line.height = state.threshold ? height * scale : 0;
  if (!state.threshold) return;
  const path = new Path2D();
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (x && inside(y, x) !== inside(y, x - 1)) { path.moveTo(x * scale, y * scale); path.lineTo(x * scale, (y + 1) * scale); }
      if (y && inside(y, x) !== inside(y - 1, x)) { path.moveTo(x * scale, y * scale); path.lineTo((x + 1) * scale, y * scale); }
    }
  }
  const context = line.getContext('2d');
  for (const [stroke, thick] of [['#000', 4], ['#fff', 2]]) {
    Object.assign(context, { strokeStyle: stroke, lineWidth: thick });
    context.stroke(path);
  }
}

function compute(map, source, points) {
  points.forEach((point, number) => {
    const out = number ? (map.spare ??= new Float32Array(map.heat.length)) : map.heat;
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

function place(mark, { y, x }) {
  mark.hidden = false;
  mark.style.left = `${100 * x}%`;
  mark.style.top = `${100 * y}%`;
}

function render() {
  const points = state.pins.length ? state.pins : state.point ? [state.point] : [];
  const began = performance.now();
  page.sources.forEach((_, source) => {
    if (points.length) for (const card of cards) compute(card.maps[source], source, points);
    const best = points.length && state.matches ? findMatches(source, points) : [];
    cards.forEach((card, image) => {
      const view = card.views[source], rank = best.findIndex((match) => match.image === image);
      view.match.hidden = rank < 0;
      if (rank >= 0) {
        view.match.textContent = `${rank + 1} · ${best[rank].value.toFixed(2)}`;
        view.match.classList.toggle('low', best[rank].y > 0.8);
        place(view.match, best[rank]);
      }
      view.value.textContent = points.length && state.point?.image === image ? view.map.heat[cellOf(view.map, state.point)].toFixed(2) : '';
      if (!card.visible) card.stale = true;
      else if (points.length || state.colours || card.stale) draw(view, points);
    });
  });
  for (const card of cards) {
    card.stale &&= !card.visible;
    for (const view of card.views) {
      view.cursor.hidden = state.point?.image !== card.image;
      if (!view.cursor.hidden) place(view.cursor, state.point);
    }
  }
  state.colours = false;
  if (points.length) element('speed').textContent = `Last frame: ${(performance.now() - began).toFixed(1)} ms.`;
}

function draw(view, points) {
  if (!view.map) return;
  if (points.length) { paintHeat(view, points.length > 1); paintOutline(view); return; }
  paintColours(view);
  view.line.width = 0;
}

function tick() {
  if (state.dirty) { state.dirty = false; render(); }
  requestAnimationFrame(tick);
}

function changed(colours = false) {
  state.dirty = true;
  state.colours ||= colours;
}

// ---- points and pins

function pointAt(image, y, x, region = 0) {
  const [height, width] = page.images[image].grids[page.finest];
  return { image, y: (clampCell(y, height) + 0.5) / height, x: (clampCell(x, width) + 0.5) / width, region };
}

function cellText({ image, y, x }) {
  const [height, width] = page.images[image].grids[page.finest];
  return `${page.images[image].name}, row ${clampCell(y, height)}, column ${clampCell(x, width)}`;
}

function moveTo(point) {
  state.point = point;
  element('status').textContent = point ? cellText(point) : '';
  changed(!point);
}

function addPin(region) {
  if (!state.point) return;
  const { image, y, x } = state.point;
  state.pins.push(pointAt(image, y, x, region ? state.threshold || REGION : 0));
  showPins();
}

function showPins() {
  document.querySelectorAll('.mark.pin').forEach((mark) => mark.remove());
  element('pins').replaceChildren();
  state.pins.forEach((pin, number) => {
    const colour = `rgb(${PINS[number % PINS.length]})`;
    const button = make('button', '', `${number + 1} ×`);
    button.title = `Remove the pin at ${cellText(pin)}${pin.region ? ', region' : ''}`;
    button.style.borderColor = colour;
    button.onclick = () => { state.pins.splice(number, 1); showPins(); };
    element('pins').append(button);
    for (const view of cards[pin.image].views) {
      const mark = make('i', `mark pin${pin.region ? ' square' : ''}`);
      mark.style.background = colour;
      place(mark, pin);
      view.box.append(mark);
    }
  });
  const link = state.pins.map(({ image, y, x, region }) => {
    const [height, width] = page.images[image].grids[page.finest];
    return `image=${image}&y=${clampCell(y, height)}&x=${clampCell(x, width)}${region ? `&region=${region}` : ''}`;
  });
  history.replaceState(null, '', `#${link.join('&')}`);
  changed(true);
}

function readLink() {
  const pins = [];
  for (const part of location.hash.slice(1).split(/&?(?=image=)/)) {
    const link = new URLSearchParams(part), image = Number(link.get('image') ?? NaN);
    if (!page.images[image]) continue;
    const [height, width] = page.images[image].grids[page.finest];
    const at = (key, count) => ((Number(link.get(key)) || 0) + 0.5) / count;
    pins.push(pointAt(image, at('y', height), at('x', width), Number(link.get('region')) || 0));
  }
  if (!pins.length && !state.pins.length) return;
  state.pins = pins;
  if (pins.length) { showFrame(pins[0].image); cards[pins[0].image].element.scrollIntoView({ block: 'center' }); }
  showPins();
}

// ---- elements

function pane(title, picture, more = '') {
  const whole = make('div', `pane ${more}`), label = make('small', ''), value = make('output', ''), box = make('div', 'view');
  const image = make('img', '');
  image.src = picture;
  image.alt = title;
  label.append(make('span', '', title), value);
  box.append(image);
  whole.append(label, box);
  return { whole, box, value, image };
}

function mapView(title, picture, map) {
  const view = pane(title, picture);
  const parts = { canvas: make('canvas', 'map'), line: make('canvas', 'line'), match: make('b', 'match'), cursor: make('i', 'mark') };
  Object.assign(parts.canvas, { width: map.width, height: map.height });
  parts.line.width = 0;
  parts.match.hidden = parts.cursor.hidden = true;
  view.box.append(...Object.values(parts));
  return Object.assign(view, parts, { map });
}

function pointerOn(box, image) {
  const at = (event) => {
    const { left, top, width, height } = box.getBoundingClientRect();
    return pointAt(image, (event.clientY - top) / height, (event.clientX - left) / width);
  };
  box.onpointermove = (event) => { if (event.pointerType !== 'touch') moveTo(at(event)); };
  box.onpointerleave = (event) => { if (event.pointerType !== 'touch') moveTo(null); };
  box.onclick = (event) => {
    const point = at(event), before = state.point;
    moveTo(point);
    const again = before?.image === image && Math.hypot(before.y - point.y, before.x - point.x) < 0.06;
    if (event.pointerType !== 'touch' || again) addPin(event.shiftKey);
  };
}

const blobUrl = (text) => URL.createObjectURL(new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], { type: 'image/jpeg' }));

function build(item, image, maps) {
  const card = make('figure', 'card'), caption = make('figcaption', ''), panes = make('div', 'panes');
  const enlarge = make('button', 'enlarge', 'Enlarge'), picture = blobUrl(item.picture);
  card.tabIndex = 0;
  card.setAttribute('aria-label', `${item.name}: arrow keys move the point, Enter pins it`);
  enlarge.onclick = () => toggleLarge(card);
  caption.append(make('span', '', item.name), enlarge);
  const views = maps.map((map, source) => mapView(`${page.sources[source]} ${map.height}×${map.width}`, picture, map));
  const photo = pane('image', picture, 'photo');
  const layers = item.layers.map((layer) => pane(layer.title, blobUrl(layer.picture)));
  photo.image.onload = () => {
    for (const { box } of [photo, ...views, ...layers]) box.style.aspectRatio = `${photo.image.naturalWidth} / ${photo.image.naturalHeight}`;
  };
  for (const { whole, box } of [photo, ...views, ...layers]) { panes.append(whole); pointerOn(box, image); }
  card.append(caption, panes);
  card.onkeydown = (event) => onKey(event, image);
  element('cards').append(card);
  return { element: card, image, maps, views, visible: false, stale: true };
}

function toggleLarge(card) {
  const large = card.classList.toggle('large');
  card.style.top = large ? `${Math.max(0, document.querySelector('.bar').getBoundingClientRect().bottom)}px` : '';
  card.querySelector('.enlarge').textContent = large ? 'Close' : 'Enlarge';
  document.body.style.overflow = large ? 'hidden' : '';
  card.focus();
}

function onKey(event, image) {
  if (event.target !== cards[image].element || event.ctrlKey || event.metaKey || event.altKey) return;
  const [height, width] = page.images[image].grids[page.finest];
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (move) {
    const from = state.point?.image === image ? state.point : pointAt(image, 0.5, 0.5);
    moveTo(pointAt(image, from.y + move[0] / height, from.x + move[1] / width));
  } else if (event.key === 'Enter') addPin(event.shiftKey);
  else if (event.key === 'f') toggleLarge(cards[image].element);
  else return;
  event.preventDefault();
}

function showFrame(image) {
  if (!page.video) return;
  cards.forEach((card, number) => card.element.classList.toggle('current', number === image));
  element('frame').value = image;
  element('frame-value').textContent = page.images[image].name;
}

function controls() {
  const slide = (id, use) => { element(id).oninput = () => use(Number(element(id).value)); use(Number(element(id).value)); };
  for (let first = 1; first < K && first < 25; first += 3) element('components').append(make('option', '', `PCA ${first}–${first + 2}`));
  element('components').onchange = (event) => { state.components = event.target.selectedIndex; changed(true); };
  slide('opacity', (value) => document.querySelectorAll('.map').forEach((canvas) => { canvas.style.opacity = value / 100; }));
  slide('size', (value) => element('cards').style.setProperty('--pane', `${value}px`));
  slide('threshold', (value) => {
    state.threshold = value / 100;
    element('threshold-value').textContent = value ? state.threshold.toFixed(2) : 'off';
    changed();
  });
  element('matches').onchange = (event) => { state.matches = event.target.checked; changed(); };
  element('pin').onclick = () => addPin(false);
  element('region').onclick = () => addPin(true);
  const clear = () => { state.pins = []; moveTo(null); showPins(); };
  element('clear').onclick = clear;
  const nudge = (id, by) => { element(id).value = Number(element(id).value) + by; element(id).oninput(); };
  const keys = {
    Escape: () => { const large = document.querySelector('.large'); if (large) toggleLarge(large); else clear(); },
    c: () => { const list = element('components'); list.selectedIndex = (list.selectedIndex + 1) % list.length; list.onchange({ target: list }); },
    m: () => element('matches').click(), '[': () => nudge('threshold', -2), ']': () => nudge('threshold', 2),
  };
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('select')) return;
    keys[event.key]?.();
  });
  element('time').hidden = !page.video;
  element('frame').max = page.images.length - 1;
  slide('frame', showFrame);
  let timer = 0;
  element('play').onclick = () => {
    element('play').textContent = timer ? 'Play' : 'Pause';
    clearInterval(timer);
    timer = timer ? 0 : setInterval(() => showFrame((Number(element('frame').value) + 1) % cards.length), 125);
  };
}

// Milliseconds of a frame, from one to the next, while the point moves; for `await measure(60)` in the console.
async function measure(frames = 60) {
  const next = () => new Promise(requestAnimationFrame);
  await next();
  const began = performance.now();
  for (let n = 0; n < frames; n++) { moveTo(pointAt(0, (n * 0.37) % 1, (n * 0.61) % 1)); await next(); }
  return (performance.now() - began) / frames;
}

async function start() {
  const values = await unpack(page.maps);
  let at = 0;
  document.body.classList.toggle('video', page.video);
  element('cards').style.setProperty('--columns', Math.min(page.sources.length + page.images[0].layers.length, 4));
  page.images.forEach((item, image) => {
    const maps = item.grids.map(([height, width]) => decodeMap(values.subarray(at, (at += height * width * K)), height, width));
    cards.push(build(item, image, maps));
  });
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) { const card = cards.find((one) => one.element === entry.target); card.visible = entry.isIntersecting; }
    changed();
  }, { rootMargin: '100px' });
  for (const card of cards) seen.observe(card.element);
  const context = element('ramp').getContext('2d');
  RAMP.forEach((colour, index) => { context.fillStyle = `rgb(${colour})`; context.fillRect(index, 0, 1, 1); });
  element('low').textContent = page.floor.toFixed(2);
  element('note').textContent = page.note;
  controls();
  readLink();
  addEventListener('hashchange', readLink);
  tick();
  document.body.dataset.ready = 'true';
}

start().catch((error) => { element('status').textContent = `This browser cannot show the page: ${error.message}`; throw error; });
