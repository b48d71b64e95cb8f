// The pool on a plane. Arrow keys step through the selected rows, Enter opens one below.
const plane = { shown: new Set(data.sources.names.keys()), chosen: new Map(), points: [], current: null };

function fitted(canvas) {
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  canvas.width = box.width * ratio;
  canvas.height = box.height * ratio;
  const context = canvas.getContext('2d');
  context.scale(ratio, ratio);
  return [context, box.width, box.height];
}

function drawMap() {
  const [context, width, height] = fitted(plane.canvas), known = [...data.map.xy, ...(data.map.targets ?? [])].filter(Boolean);
  const span = (axis) => known.reduce(([low, high], one) => [Math.min(low, one[axis]), Math.max(high, one[axis])], [Infinity, -Infinity]);
  const [x, y] = [scale(...span(0), 14, width - 14), scale(...span(1), height - 14, 14)];
  const style = getComputedStyle(document.documentElement), [ink, mark] = ['--ink', '--mark'].map((one) => style.getPropertyValue(one));
  const dot = (at, radius) => {
    context.beginPath();
    context.arc(x(data.map.xy[at][0]), y(data.map.xy[at][1]), radius, 0, 7);
  };
  context.clearRect(0, 0, width, height);
  plane.points = [];
  const visible = data.map.xy.map((one, at) => at).filter((at) => data.map.xy[at] && plane.shown.has(data.rows.source[at]));
  for (const at of visible) {
    plane.points.push([x(data.map.xy[at][0]), y(data.map.xy[at][1]), at]);
    context.globalAlpha = plane.chosen.has(at) ? 0 : 0.35;
    context.fillStyle = sourceColour(data.rows.source[at]);
    dot(at, visible.length > 1500 ? 2 : 3);
    context.fill();
  }
  context.globalAlpha = 1;
  for (const at of visible.filter((one) => plane.chosen.has(one))) {
    context.fillStyle = sourceColour(data.rows.source[at]);
    context.strokeStyle = ink;
    context.lineWidth = 1;
    dot(at, visible.length > 1500 ? 3.5 : 4.5);
    context.fill();
    context.stroke();
  }
  context.fillStyle = mark;
  for (const one of (data.map.targets ?? []).filter(Boolean)) {
    const [cx, cy] = [x(one[0]), y(one[1])];
    context.beginPath();
    for (const [dx, dy] of [[0, -7], [5, 0], [0, 7], [-5, 0]]) context.lineTo(cx + dx, cy + dy);
    context.fill();
  }
  if (plane.current !== null && data.map.xy[plane.current]) {
    context.strokeStyle = mark;
    context.lineWidth = 2.5;
    dot(plane.current, 8);
    context.stroke();
  }
}

function tell(at) {
  plane.current = at;
  const rank = plane.chosen.get(at), where = rank === undefined ? 'not selected' : `rank ${rank + 1}`;
  plane.told.replaceChildren(el('strong', {}, `${sourceName(data.rows.source[at])}, ${where}, ${whole(data.rows.tokens[at])} tokens: `),
    el('span', { dir: 'auto' }, rowText(at).slice(0, 300)));
  drawMap();
}

function nearestPoint(event) {
  const box = plane.canvas.getBoundingClientRect(), [mx, my] = [event.clientX - box.left, event.clientY - box.top];
  let best = null, least = 144;
  for (const [px, py, at] of plane.points) {
    const distance = (px - mx) ** 2 + (py - my) ** 2 - (plane.chosen.has(at) ? 4 : 0);
    if (distance < least) [best, least] = [at, distance];
  }
  return best;
}

function stepMap(event) {
  const order = [...plane.chosen.keys()].filter((at) => data.map.xy[at]), step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === 'Enter' && plane.current !== null) {
    event.preventDefault(); // or the row that gets the focus would be pressed as well
    openRow(plane.current);
  }
  if (!step || !order.length) return;
  event.preventDefault();
  const now = order.indexOf(plane.current);
  tell(order[now < 0 ? 0 : (now + step + order.length) % order.length]);
}

function legendOf() {
  const entry = (code) => el('li', {}, el('button', { type: 'button', 'aria-pressed': 'true', on: { click: (event) => {
    const on = plane.shown.has(code);
    if (on) plane.shown.delete(code); else plane.shown.add(code);
    event.currentTarget.setAttribute('aria-pressed', String(!on));
    drawMap();
  } } }, el('span', { class: 'swatch', style: { background: sourceColour(code) } }), sourceName(code)));
  return el('ul', { class: 'legend', 'aria-label': 'Sources on the map' }, ...data.sources.names.map((_, code) => entry(code)));
}

function makeMap() {
  if (!data.map) {
    place('map').replaceChildren(note('This run has no dense feature of the pool; add one to its recipe, e.g. emb: {extractor: embedding}.'));
    return;
  }
  const over = (event) => {
    const at = nearestPoint(event);
    if (at !== null && at !== plane.current) tell(at);
  };
  plane.canvas = el('canvas', { tabindex: '0', role: 'img', on: { mousemove: over, keydown: stepMap, click: (event) => {
    const at = nearestPoint(event);
    if (at !== null) openRow(at);
  } }, 'aria-label': 'Map of the pool. Arrow keys step through the selected rows, Enter shows one in the table below.' });
  plane.told = el('p', { class: 'told', 'aria-live': 'polite' }, 'Point at a row, or step through the selected ones with the arrow keys.');
  place('map').replaceChildren(note(`Principal components of ${data.map.feature}: ${share(data.map.share)} of its variance. Outlined: selected. Diamonds: target examples.`),
    plane.canvas, plane.told, legendOf());
  window.addEventListener('resize', drawMap);
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', drawMap);
}
