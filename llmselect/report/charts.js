// Charts as SVG: each with a label that says what it shows.
const W = 640;
const M = { left: 60, right: 16, top: 12, bottom: 36 };

function frame(height, label) {
  const root = svg('svg', { viewBox: `0 0 ${W} ${height}`, role: 'img', 'aria-label': label });
  root.append(svg('line', { class: 'axis', x1: M.left, x2: W - M.right, y1: height - M.bottom, y2: height - M.bottom }));
  return root;
}

function text(x, y, value, anchor = 'middle') {
  return svg('text', { x, y, 'text-anchor': anchor }, value);
}

const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

// Round numbers between low and high, at most seven: `[value, text]`.
function round(low, high) {
  const rough = (high - low) / 6 || 1, ten = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find((one) => one * ten >= rough) * ten;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push([i * step, digits > 6 ? short(i * step, 3) : (i * step || 0).toFixed(digits)]);
  return found;
}

// Shares of pool and selection in the same bins; `edges` has one more entry than there are bins, ticks at `ticks`.
function histogram(pool, chosen, ticks, label) {
  const height = 220, root = frame(height, label);
  root.setAttribute('class', 'small');
  const total = (counts) => Math.max(1, counts.reduce((a, b) => a + b, 0));
  const shares = [pool, chosen].map((counts) => counts.map((count) => count / total(counts)));
  const most = Math.max(...shares.flat(), 1e-9);
  const x = scale(0, pool.length, M.left, W - M.right), y = scale(0, most, height - M.bottom, M.top);
  shares.forEach((part, which) => part.forEach((value, i) => {
    if (!value) return;
    const box = { class: which ? 'chosen' : 'pool', x: x(i) + (which ? 2 : 0), y: y(value) };
    root.append(svg('rect', { ...box, width: Math.max(1, x(1) - x(0) - (which ? 4 : 1)), height: y(0) - y(value) }));
  }));
  for (const [at, value] of ticks) root.append(text(x(at), height - M.bottom + 20, value));
  root.append(text(0, y(most) + 8, share(most), 'start'));
  return root;
}

const key = () => el('p', { class: 'note' }, el('span', { class: 'key' }), 'pool', el('span', { class: 'key chosen' }), 'selected');

function drawDistributions(view) {
  const target = place('distributions'), scores = view.scores, edges = data.lengths.edges;
  const first = data.lengths.pool.findIndex((count) => count), last = data.lengths.pool.findLastIndex((count) => count);
  const cut = (counts) => counts.slice(first, last + 1);
  const lengthTicks = [];
  for (let i = first; i <= last + 1; i += Math.max(1, Math.ceil((last - first) / 7))) lengthTicks.push([i - first, whole(edges[i])]);
  const length = el('div', {}, el('h3', {}, 'Supervised tokens per row'),
    histogram(cut(data.lengths.pool), cut(view.lengths), lengthTicks, `Lengths of pool and ${view.name}`), key());
  if (view.score_length !== null && view.score_length !== undefined) {
    length.append(note(`Rank correlation of score and length among the selected rows: ${short(view.score_length, 2)}.`));
  }
  const left = el('div', {}, el('h3', {}, 'Scores'));
  if (scores) {
    const bin = scale(scores.low, scores.high, 0, scores.pool.length), ticks = round(scores.low, scores.high).map(([value, told]) => [bin(value), told]);
    left.append(histogram(scores.pool, scores.selected, ticks, `Scores of pool and ${view.name}`), key(),
      note('Best target group of each row; the outermost 0.1 % of the pool stand in the end bins.'));
  } else left.append(note('This method scores no rows.'));
  target.replaceChildren(left, length);
}

function drawSources() {
  const all = data.sources.pool.reduce((a, b) => a + b, 0), methods = [...new Set(data.views.map((view) => view.method))];
  const before = data.sources.pool.map((count) => count / all);
  const after = methods.map((method) => {
    const views = data.views.filter((view) => view.method === method), rows = views.reduce((sum, view) => sum + view.rows, 0);
    return before.map((_, code) => views.reduce((sum, view) => sum + view.sources[code], 0) / Math.max(1, rows));
  });
  const most = Math.max(...before, ...after.flat(), 1e-9);
  const bar = (value) => el('i', { style: { width: percent(value / most) } });
  const lines = before.map((value, code) => [sourceName(code), share(value),
    ...after.map((part) => el('span', {}, el('span', { class: 'track' }, bar(value), bar(part[code])), el('span', { class: 'share' }, share(part[code]))))]);
  place('sources').replaceChildren(plainTable(['source', 'pool', ...methods], lines, 'Share of each source in the pool and in the selections'), key(),
    note('Selections of several seeds together.'));
}

function drawOverlap() {
  const names = data.views.map((view) => view.name);
  const lines = data.overlap.map((line, i) => [names[i], ...line.map((value) => el('span', {
    style: { background: `rgba(var(--heat), ${(0.55 * value).toFixed(3)})`, padding: '.1rem .5rem' } }, value.toFixed(2)))]);
  place('overlap').replaceChildren(plainTable(['', ...names], lines, 'Jaccard overlap of every two selections'),
    note('Rows in both, divided by rows in either. Seeds that gave the same rows are one selection.'));
}

function whiskers(rows) {
  const line = 24, height = rows.length * line + M.top + M.bottom + 16, name = (row) => (row.method.length > 22 ? `${row.method.slice(0, 21)}…` : row.method);
  const left = Math.max(90, 24 + 10.5 * Math.max(...rows.map((row) => name(row).length))); // letters are widest on narrow screens
  const root = svg('svg', { viewBox: `0 0 ${W} ${height}`, role: 'img', 'aria-label': 'Held-out loss of every method with its interval' });
  const low = Math.min(...rows.map((row) => row.low)), high = Math.max(...rows.map((row) => row.high));
  const x = scale(low, high, left + 8, W - M.right - 8), bottom = M.top + rows.length * line;
  rows.forEach((row, i) => {
    const y = M.top + (i + 0.5) * line, told = svg('title', {}, `${row.method}: ${row.nll.toFixed(3)} [${row.low.toFixed(3)}, ${row.high.toFixed(3)}]`);
    const limit = (value) => svg('line', { class: 'span', x1: x(value), x2: x(value), y1: y - 5, y2: y + 5 });
    root.append(text(left - 12, y + 5, name(row), 'end'), svg('line', { class: 'axis', x1: left, x2: W - M.right, y1: y, y2: y }),
      svg('line', { class: 'span', x1: x(row.low), x2: x(row.high), y1: y, y2: y }), limit(row.low), limit(row.high),
      svg('circle', { class: 'best', cx: x(row.nll), cy: y, r: 3 }, told));
  });
  for (const [value, told] of round(low, high)) {
    root.append(svg('line', { class: 'axis', x1: x(value), x2: x(value), y1: M.top, y2: bottom + 4 }), text(x(value), bottom + 20, told));
  }
  root.append(text((left + W - M.right) / 2, bottom + 40, 'nats per response token, 95 % intervals'));
  return root;
}

function drawResults() {
  if (!data.results || !data.results.rows.length) {
    place('results').replaceChildren(note('No held-out results in this run: they need test rows in targets, and llmselect run to its end (it continues where it stopped).'));
    return;
  }
  const rows = data.results.rows, told = Object.keys(rows[0].tasks), groups = data.targets.map((one) => one.group);
  const tasks = [...new Set([...groups, ...told])].filter((task) => told.includes(task)), signed = (value) => `${value > 0 ? '+' : ''}${value.toFixed(3)}`;
  const range = (row) => (row.difference === null ? '' : `${signed(row.difference)} [${signed(row.difference_low)}, ${signed(row.difference_high)}]`);
  const lines = rows.map((row) => [row.method, row.rows ? whole(row.rows) : '', row.tokens ? whole(row.tokens) : '',
    `${row.nll.toFixed(3)} [${row.low.toFixed(3)}, ${row.high.toFixed(3)}]`, row.sd === null ? '' : row.sd.toFixed(3), range(row),
    ...tasks.map((task) => row.tasks[task].toFixed(3))]);
  const head = ['method', 'rows', 'tokens', 'held-out NLL [95 %]', 'sd over seeds', 'Δ random [95 %]', ...tasks];
  place('results').replaceChildren(whiskers(rows), el('div', { class: 'wide' }, plainTable(head, lines, 'Held-out results')),
    note('Nats per response token, averaged over tasks; lower is better. Bootstrap over held-out rows, seeds averaged.'));
}
