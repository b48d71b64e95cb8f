// What single methods tell: transport curves (tarot_auto), pulls of a bandit (quad), clusters (kmq).
function curves(folds) {
  const height = 230, root = frame(height, 'Transport cost against the number of nearest rows, one line per fold');
  const longest = Math.max(...folds.map((one) => one.curve.length)), all = folds.flatMap((one) => one.curve);
  const x = scale(1, Math.max(2, longest), M.left, W - M.right), low = Math.min(...all), high = Math.max(...all);
  const y = scale(low, high, height - M.bottom, M.top);
  for (const { curve, best } of folds) {
    root.append(svg('path', { class: 'line', d: curve.map((value, i) => `${i ? 'L' : 'M'}${x(i + 1)} ${y(value)}`).join('') }));
    if (best >= 1 && best <= curve.length) root.append(svg('circle', { class: 'best', cx: x(best), cy: y(curve[best - 1]), r: 4 }));
  }
  root.append(text(M.left, height - 4, '1'), text(W - M.right, height - 4, `k = ${longest}`, 'end'),
    text(M.left - 6, y(high) + 8, short(high, 3), 'end'), text(M.left - 6, y(low), short(low, 3), 'end'));
  return el('div', {}, el('h3', {}, 'Transport cost to the judges of each fold'), root,
    note('A dot marks the k that was kept: the cost falls while near rows are added, and rises when far ones follow.'));
}

function pulls(view) {
  const trace = view.report.trace.filter((one) => one.mean !== null), height = 230;
  const root = frame(height, 'Mean reward of every pull, in order');
  if (!trace.length) return note('No pull of the bandit had a finite reward.');
  const means = trace.map((one) => one.mean), low = Math.min(...means), high = Math.max(...means);
  const x = scale(0, Math.max(1, trace.length - 1), M.left, W - M.right), y = scale(low, high, height - M.bottom, M.top);
  trace.forEach((one, i) => {
    const told = svg('title', {}, `round ${one.round}, cluster ${one.cluster}: ${one.rows} rows, mean ${short(one.mean)}${one.accepted ? ', accepted' : ''}`);
    root.append(svg('circle', { class: one.accepted ? 'chosen' : 'hollow', cx: x(i), cy: y(one.mean), r: 3 }, told));
  });
  root.append(text(M.left - 6, y(high) + 8, short(high, 3), 'end'), text(M.left - 6, y(low), short(low, 3), 'end'),
    text(W - M.right, height - 10, `${trace.length} pulls`, 'end'));
  return el('div', {}, el('h3', {}, 'Pulls of the bandit'), root,
    note(`Mean reward of the rows that each pull scored; filled: accepted.${view.report.pulls > trace.length ? ` The first ${trace.length} of ${view.report.pulls}.` : ''}`));
}

function clusters(sizes) {
  const height = 190, root = frame(height, 'Rows and budget of each cluster, largest first');
  const most = Math.max(1, ...sizes.map((one) => one[1])), x = scale(0, sizes.length, M.left, W - M.right);
  const y = scale(0, Math.sqrt(most), height - M.bottom, M.top);
  sizes.forEach(([number, rows, budget], i) => {
    const width = Math.max(1, x(1) - x(0) - 1);
    const bar = (kind, value) => svg('rect', { class: kind, x: x(i), y: y(Math.sqrt(value)), width, height: y(0) - y(Math.sqrt(value)) },
      svg('title', {}, `cluster ${number}: ${whole(rows)} rows, budget ${whole(budget)}`));
    root.append(bar('pool', rows), bar('chosen', budget));
  });
  root.append(text(M.left - 6, y(Math.sqrt(most)) + 8, whole(most), 'end'));
  return el('div', {}, el('h3', {}, 'Clusters'), root, key(), note('Rows of each cluster and its share of the budget, on a square-root scale.'));
}

function drawMethod(view) {
  const report = view.report, parts = [];
  const setting = (value) => (value === null || value === undefined ? '–' : typeof value === 'object' ? JSON.stringify(value) : String(value));
  const budget = ({ fraction, tokens, rows } = {}) => (fraction ? share(fraction) : tokens ? `${whole(tokens)} tokens` : rows ? `${whole(rows)} rows` : setting(view.budget));
  const plain = Object.entries(report).filter(([, value]) => ['number', 'boolean', 'string'].includes(typeof value));
  const lines = [['selector', String(view.selector ?? 'by hand')], ['budget', budget(view.budget ?? {})], ['rows', whole(view.rows)],
    ['supervised tokens', whole(view.tokens)],
    ...(typeof view.kl_reduction === 'number' ? [['n-grams nearer to the target than the pool’s, nats', short(view.kl_reduction)]] : []),
    ...Object.entries(view.config ?? {}).map(([name, value]) => [name, setting(value)])];
  // Apart, because a setting left open and what the method found for it have the same name.
  const findings = plain.map(([name, value]) => [name.replaceAll('_', ' '), typeof value === 'number' ? short(value) : String(value)]);
  parts.push(el('div', { class: 'wide settings' }, plainTable(['setting', view.name], lines, 'Settings of the method')));
  if (findings.length) parts.push(el('h3', {}, 'Found'), el('div', { class: 'wide settings' }, plainTable(['figure', view.name], findings, 'Findings of the method')));
  if (report.folds) parts.push(curves(report.folds));
  if (report.trace) parts.push(pulls(view));
  if (report.sizes) parts.push(clusters(report.sizes));
  if (report.silhouettes) {
    const tried = Object.entries(report.silhouettes).map(([count, value]) => [count, short(value)]);
    parts.push(el('h3', {}, 'Silhouette by number of clusters'), plainTable(['clusters', 'silhouette'], tried, 'Silhouettes'));
  }
  place('method').replaceChildren(...parts);
}
