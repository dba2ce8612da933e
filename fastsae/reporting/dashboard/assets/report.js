"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  // --- elements: text is always text, never markup ---
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  function svg(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  // Signs that cannot be seen are shown by name: controls, marks of direction, line ends.
  const hidden = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const named = { "\n": "↵", "\t": "⇥", "\r": "␍" };
  const visible = (text) =>
    text.replace(hidden, (c) => named[c] || "‹" + c.charCodeAt(0).toString(16).padStart(4, "0") + "›");
  const token = (text) => el("code", { class: "tok" }, el("bdi", {}, visible(text).replace(/^ /, "␣")));

  // --- numbers ---
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const whole = new Intl.NumberFormat("en");
  const short = (v) => {
    if (v === null || v === undefined) return "–";
    if (v !== 0 && (Math.abs(v) < 0.001 || Math.abs(v) >= 1e5)) return v.toExponential(1);
    return String(Number(v.toPrecision(3)));
  };
  const share = (v) => (v === 0 ? "0" : v >= 0.0001 ? short(100 * v) + " %" : (100 * v).toExponential(0) + " %");

  // --- charts ---
  const W = 360, H = 180, L = 44, R = 10, T = 10, B = 26;
  function ticks(low, high, count = 4) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw - 1e-12);
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9 * step; v += step) {
      found.push(Math.abs(v) < step / 1e6 ? 0 : v);
    }
    return found;
  }
  function frame(label, x, y, xText, yText = short) {
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
    const px = (v) => L + ((v - x[0]) / (x[1] - x[0] || 1)) * (W - L - R);
    const py = (v) => H - B - ((v - y[0]) / (y[1] - y[0] || 1)) * (H - T - B);
    for (const v of ticks(...y)) {
      root.append(svg("line", { class: "grid", x1: L, x2: W - R, y1: py(v), y2: py(v) }));
      root.append(svg("text", { x: L - 6, y: py(v) + 4, "text-anchor": "end" }, yText(v)));
    }
    for (const v of ticks(...x)) {
      root.append(svg("text", { x: px(v), y: H - 8, "text-anchor": "middle" }, xText(v)));
    }
    return { root, px, py };
  }
  function chart(title, draw) {
    const readout = el("output", {});
    return el("figure", { class: "chart" }, el("figcaption", {}, title, readout), draw(readout));
  }
  function lines(title, xs, ys, { reference = null, low = null, high = null } = {}) {
    const points = xs.map((x, i) => [x, ys[i]]).filter((p) => Number.isFinite(p[1]));
    if (points.length < 2) return null;
    const values = points.map((p) => p[1]).concat(reference ? [reference.value] : []);
    const y = [low ?? Math.min(...values), high ?? Math.max(...values)];
    if (y[0] === y[1]) y[1] = y[0] + 1;
    const last = points[points.length - 1];
    return chart(title, (readout) => {
      const label = `${title}: from ${short(points[0][1])} to ${short(last[1])}`;
      const { root, px, py } = frame(label, [0, last[0]], y, (v) => compact.format(v));
      if (reference) {
        const at = py(reference.value);
        root.append(svg("line", { class: "ref", x1: L, x2: W - R, y1: at, y2: at }));
        root.append(svg("text", { class: "reftext", x: W - R, y: at - 5, "text-anchor": "end" }, reference.name));
      }
      root.append(svg("path", { class: "line", d: "M" + points.map((p) => `${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join("L") }));
      readout.textContent = short(last[1]);
      root.addEventListener("pointermove", (event) => {
        const box = root.getBoundingClientRect();
        const at = ((event.clientX - box.left) / box.width) * W;
        const near = points.reduce((a, b) => (Math.abs(px(b[0]) - at) < Math.abs(px(a[0]) - at) ? b : a));
        readout.textContent = `${compact.format(near[0])}: ${short(near[1])}`;
      });
      root.addEventListener("pointerleave", () => (readout.textContent = short(last[1])));
      return root;
    });
  }
  function bars(title, edges, counts, xText, { outline = null, unit = "" } = {}) {
    const scale = outline ? counts.reduce((a, b) => a + b, 0) / (outline.reduce((a, b) => a + b, 0) || 1) : 1;
    const other = (outline || []).map((v) => v * scale);
    return chart(title, (readout) => {
      const filled = counts.map((c, i) => (c || other[i] ? i : -1)).filter((i) => i >= 0);
      const first = filled[0] ?? 0, end = filled[filled.length - 1] ?? 0;
      const { root, px, py } = frame(title, [edges[first], edges[end + 1]], [0, Math.max(...counts, ...other, 1)], xText, (v) => compact.format(v));
      for (let i = first; i <= end; i++) {
        const x = px(edges[i]), width = Math.max(0.5, px(edges[i + 1]) - x - 0.8);
        const bar = svg("rect", { class: "bar", x, width, y: py(counts[i]), height: H - B - py(counts[i]) });
        bar.append(svg("title", {}, `${xText(edges[i])} to ${xText(edges[i + 1])}: ${whole.format(counts[i])} ${unit}`));
        root.append(bar);
      }
      if (outline) {
        let path = "";
        for (let i = first; i <= end; i++) path += `${path ? "L" : "M"}${px(edges[i]).toFixed(1)} ${py(other[i]).toFixed(1)}H${px(edges[i + 1]).toFixed(1)}`;
        root.append(svg("path", { class: "ref", d: path }));
        readout.textContent = "dashed: random directions";
      }
      return root;
    });
  }

  // --- the head of the page ---
  document.querySelector("h1").textContent = data.title;
  const f = data.facts;
  byId("facts").textContent =
    `${whole.format(f.d_sae)} latents (${f.activation}${f.k ? ", k " + short(f.k) : ""}) on ${whole.format(f.d_in)} dimensions` +
    (f.hook ? ` of ${f.hook}` : "") + (f.model ? ` in ${f.model}` : "");
  const evaluation = data.evaluation;
  const modes = evaluation ? Object.keys(evaluation.modes) : [];
  const main = evaluation ? evaluation.modes[modes[0]] : null;
  function tile(value, name) {
    byId("tiles").append(el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name)));
  }
  if (main) {
    tile(main.explained_variance.value.toFixed(3), `explained variance (${modes[0]})`);
    if (evaluation.pca.explained_variance !== null) tile(evaluation.pca.explained_variance.toFixed(3), `PCA, ${evaluation.pca.components} components`);
    if (main.loss_recovered) tile(main.loss_recovered.value.toFixed(3), "loss recovered");
    tile(short(main.l0.value), "active latents per token (L0)");
    tile(share(main.alive_fraction), "latents alive");
  }

  // --- sections ---
  function estimate(e) {
    if (!e) return "–";
    const interval = e.low === null ? null : el("small", {}, `${short(e.low)} to ${short(e.high)}`);
    return el("span", {}, Math.abs(e.value) < 10 ? e.value.toFixed(4) : short(e.value), interval);
  }
  function table(head, rows) {
    return el("div", { class: "scroll", tabindex: "0" }, el("table", {},
      el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col" }, h)))),
      el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((c, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, c)))))));
  }
  if (main) {
    const q = (m) => `${m.l0_quantiles["0.05"]} to ${m.l0_quantiles["0.95"]}`;
    const rows = [
      ["Explained variance", (m) => estimate(m.explained_variance)],
      ...Object.keys(main.levels).slice(0, -1).map((n) => [`by the first ${whole.format(n)} latents`, (m) => estimate(m.levels[n])]),
      ["Normalised MSE", (m) => estimate(m.normalized_mse)],
      ["Cosine", (m) => estimate(m.cosine)],
      ["L0", (m) => estimate(m.l0)],
      ["L0 of 5 % to 95 % of tokens", q],
      ["Loss recovered", (m) => estimate(m.loss_recovered)],
      ["Loss recovered from mean ablation", (m) => estimate(m.loss_recovered_from_mean)],
      ["Cross-entropy (nats)", (m) => estimate(m.cross_entropy)],
      ["KL (nats)", (m) => estimate(m.kl)],
      ["Alive, dead, dense latents", (m) => [m.alive, m.dead, m.dense].map((v) => whole.format(v)).join(", ")],
    ].filter(([name]) => main.loss_recovered || !/Loss|Cross|KL/.test(name));
    const losses = evaluation.losses;
    const note = `${whole.format(evaluation.tokens)} held-out tokens (${evaluation.text}); small print: ${evaluation.interval}.` +
      (losses.clean ? ` Cross-entropy of the model: clean ${losses.clean.value.toFixed(3)}, zero ablation ${losses.zero.value.toFixed(3)}, mean ablation ${losses.mean.value.toFixed(3)}.` : "") +
      ` PCA is fitted on ${evaluation.pca.fitted_on}. Alive: active on some evaluated token; dense: on over 10 % of them.`;
    byId("evaluation").hidden = false;
    byId("evaluation").lastElementChild.append(
      table(["", ...modes], rows.map(([name, cell]) => [name, ...modes.map((m) => cell(evaluation.modes[m]))])),
      el("p", { class: "note" }, note));
  }
  const c = data.curves;
  if (c && c.tokens.length > 1) {
    byId("training").hidden = false;
    const pca = evaluation && evaluation.pca.explained_variance;
    byId("training").lastElementChild.append(...[
      lines("Explained variance", c.tokens, c.explained_variance, { high: 1, reference: pca ? { value: pca, name: `PCA, ${evaluation.pca.components} components` } : null }),
      lines("Objective", c.tokens, c.objective),
      lines("Alive latents", c.tokens, c.alive_fraction, { low: 0, high: 1 }),
    ].filter(Boolean));
  }
  const charts = byId("distributions").lastElementChild;
  if (main) {
    const d = main.density_histogram;
    charts.append(bars("Feature density", d.edges, d.counts, (v) => "10" + superscript(v), { unit: "latents" }));
    const counts = data.l0.counts, step = Math.max(1, Math.ceil(counts.length / 60)), grouped = [], edges = [];
    for (let i = 0; i < counts.length; i += step) {
      edges.push(i);
      grouped.push(counts.slice(i, i + step).reduce((a, b) => a + b, 0));
    }
    edges.push(edges.length * step);
    charts.append(bars(`Active latents per token (${data.l0.mode})`, edges, grouped, short, { unit: "tokens" }));
  }
  if (data.cosines.found) {
    const { found, random } = data.cosines;
    charts.append(bars("Cosine to the nearest decoder row", found.edges, found.counts, (v) => v.toFixed(1), { outline: random.counts, unit: "latents" }));
  }
  function superscript(v) {
    return String(Number(v.toFixed(1))).replace(/./g, (s) => ({ "-": "⁻", ".": "·", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" })[s]);
  }
  if (data.contrast) {
    const k = data.contrast;
    byId("contrast").hidden = false;
    const rows = k.latents.slice(0, 50).map((l) => [
      el("a", { class: "latent", href: `#latent-${l.latent}` }, String(l.latent)), short(l.auroc), short(l.q_value),
      `${share(l.fires_positive)} / ${share(l.fires_negative)}`, `${short(l.mean_positive)} / ${short(l.mean_negative)}`]);
    byId("contrast").lastElementChild.append(
      table(["Latent", "AUROC", "q", "Fires in documents (+ / −)", "Mean activation (+ / −)"], rows),
      el("p", { class: "note" }, k.summary.join(" ")));
  }

  // --- data beside the page ---
  const { folder, count, latents_per_file: perFile, rows_per_file: rowsPerFile, before } = data.latents;
  const waiting = new Map(), loaded = new Map();
  window.fastsaeData = (name, value) => {
    loaded.set(name, value);
    if (waiting.has(name)) waiting.get(name).resolve(value);
  };
  function need(name) {
    if (loaded.has(name)) return Promise.resolve(loaded.get(name));
    if (!waiting.has(name)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
      waiting.set(name, entry);
      const script = el("script", { src: `${folder}/${name}.js` });
      script.onerror = () => {
        waiting.delete(name);
        entry.reject(new Error(`${folder}/${name}.js is missing: it must lie beside this page`));
      };
      script.onload = () => script.remove();
      document.head.append(script);
    }
    return waiting.get(name).promise;
  }

  // --- the list ---
  const PER_PAGE = 25;
  let index = null, order = [], page = 0, current = null;
  const columns = { density: ["Density", share], max: ["Max", short] };
  function begin(found) {
    index = found;
    const sorts = { number: "number", density: "density", max: "largest activation", mean: "mean activation", near: "cosine to nearest" };
    for (const [key, name] of Object.entries(sorts)) {
      if (key === "number" || index[key]) byId("sort").append(el("option", { value: key }, name));
    }
    if (index.density) byId("sort").value = "max";
    const heads = Object.entries(columns).filter(([key]) => index[key]);
    byId("list").tHead.append(el("tr", {}, el("th", { scope: "col" }, "Latent"),
      ...heads.map(([, [name]]) => el("th", { scope: "col", class: "number" }, name)), el("th", { scope: "col" }, index.peak ? "Peaks on" : "Promotes")));
    find();
    select(fromHash() ?? order[0] ?? 0, false);
  }
  function find() {
    const query = byId("search").value, wanted = query.trim().toLowerCase();
    order = [];
    for (let i = 0; i < count; i++) {
      const tokens = [...((index.peak || [])[i] || []), ...((index.promoted || [])[i] || [])];
      if (!wanted || String(i) === wanted || tokens.some((t) => t.toLowerCase().includes(wanted))) order.push(i);
    }
    const key = byId("sort").value;
    if (index[key]) order.sort((a, b) => index[key][b] - index[key][a] || a - b);
    page = 0;
    list();
  }
  function list() {
    const pages = Math.max(1, Math.ceil(order.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const rows = order.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((i) => {
      const cells = Object.entries(columns).filter(([key]) => index[key]).map(([key, [, format]]) => el("td", { class: "number" }, format(index[key][i])));
      const tokens = ((index.peak || index.promoted || [])[i] || []).map(token);
      const row = el("tr", { "aria-current": i === current ? "true" : null }, el("td", {}, el("a", { href: `#latent-${i}` }, String(i))), ...cells, el("td", {}, ...tokens));
      row.addEventListener("click", () => { location.hash = `latent-${i}`; });
      return row;
    });
    byId("list").tBodies[0].replaceChildren(...rows);
    byId("where").textContent = `${whole.format(order.length)} latents, page ${page + 1} of ${pages}`;
    byId("back").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  }
  const fromHash = () => {
    const found = /^#latent-(\d+)$/.exec(location.hash);
    return found && Number(found[1]) < count ? Number(found[1]) : null;
  };

  // --- one latent ---
  async function select(latent, follow = true) {
    current = latent;
    const at = order.indexOf(latent);
    if (at >= 0) page = Math.floor(at / PER_PAGE);
    list();
    const target = byId("detail");
    try {
      const entry = (await need(`latents-${Math.floor(latent / perFile)}`))[latent % perFile];
      const passages = [...(entry.top || []), ...(entry.random || [])];
      const files = [...new Set(passages.map((p) => Math.floor(p[0] / rowsPerFile)))];
      await Promise.all(files.map((n) => need(`text-${n}`)));
      if (current === latent) target.replaceChildren(...detail(latent, entry));
    } catch (error) {
      target.replaceChildren(el("p", { class: "note" }, error.message));
    }
    if (follow) byId("detail").scrollIntoView({ block: "nearest" });
  }
  function detail(latent, entry) {
    const top = index.max ? index.max[latent] : 0;
    const facts = index.density ? `active on ${share(index.density[latent])} of tokens, ${short(index.mean[latent])} on average, at most ${short(top)}` : "";
    const parts = [el("p", { class: "title" }, `Latent ${latent}`), el("p", { class: "note" }, facts)];
    if (entry.top && !entry.top.length) parts.push(el("p", {}, "Silent on the held-out text."));
    if (entry.top && entry.top.length) parts.push(el("h3", {}, "Strongest passages"), ...entry.top.map((p) => passage(p, top)));
    if (entry.random && entry.random.length) parts.push(el("h3", {}, "Passages at random"), ...entry.random.map((p) => passage(p, top)));
    if (entry.promoted) {
      parts.push(el("div", { class: "pair" },
        el("div", {}, el("h3", {}, "Raises the logits of"), ranked(entry.promoted.map(([t, v]) => [token(t), v]))),
        el("div", {}, el("h3", {}, "Lowers the logits of"), ranked(entry.suppressed.map(([t, v]) => [token(t), v])))));
    }
    const near = el("div", {}, el("h3", {}, "Nearest decoder rows (cosine)"), ranked(entry.near.map(([i, v]) => [
      el("span", {}, el("a", { href: `#latent-${i}` }, String(i)), " ", ...((index.peak || [])[i] || []).map(token)), v])));
    const histogram = entry.histogram && entry.histogram.length ? el("div", {}, el("h3", {}, "Activations (log scale)"), activations(entry.histogram)) : null;
    parts.push(el("div", { class: "pair" }, histogram, near));
    return parts;
  }
  function activations([low, ...counts]) {
    const edges = [...counts, 0].map((_, i) => (low + i) / 2);
    const figure = bars("Activations", edges, counts, (v) => short(2 ** v), { unit: "tokens" });
    return figure.querySelector("svg");
  }
  function ranked(rows) {
    return el("ul", { class: "ranked" }, ...rows.map(([name, value]) => el("li", {}, name, el("span", {}, (value > 0 ? "+" : "") + short(value)))));
  }
  function passage([row, position, pairs], top) {
    const tokens = loaded.get(`text-${Math.floor(row / rowsPerFile)}`)[row % rowsPerFile];
    const values = new Map();
    for (let i = 0; i < pairs.length; i += 2) values.set(position - before + pairs[i], pairs[i + 1]);
    const start = Math.max(0, position - before), end = Math.min(tokens.length, position + 10);
    const line = el("span", { class: "tokens", dir: "ltr" });
    if (start > 0) line.append("… ");
    for (let i = start; i < end; i++) {
      const value = values.get(i);
      const node = el("bdi", value ? { title: short(value) } : {}, visible(tokens[i]));
      if (value) node.style.background = `color-mix(in srgb, var(--hot) ${Math.round(12 + 58 * Math.min(1, value / (top || 1)))}%, transparent)`;
      if (i === position) node.classList.add("peak");
      line.append(node);
    }
    if (end < tokens.length) line.append(" …");
    return el("p", { class: "passage" }, el("span", { class: "value" }, short(values.get(position))), line);
  }

  // --- controls ---
  const random = () => { location.hash = `latent-${Math.floor(Math.random() * count)}`; };
  function move(by) {
    const at = order.indexOf(current) + by;
    if (at >= 0 && at < order.length) location.hash = `latent-${order[at]}`;
  }
  byId("search").addEventListener("input", find);
  byId("sort").addEventListener("change", find);
  byId("random").addEventListener("click", random);
  byId("back").addEventListener("click", () => { page--; list(); });
  byId("next").addEventListener("click", () => { page++; list(); });
  addEventListener("hashchange", () => { const latent = fromHash(); if (latent !== null) select(latent); });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const action = { "/": () => byId("search").focus(), j: () => move(1), k: () => move(-1), r: random }[event.key];
    if (action && index) { event.preventDefault(); action(); }
  });
  need("index").then(begin, (error) => byId("detail").replaceChildren(el("p", { class: "note" }, error.message)));
})();
