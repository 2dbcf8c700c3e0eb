"use strict";
// Draws a heat map when the reader opens it. Texts go into the page by textContent alone.
(() => {
  const CELL = 18; // pixels of the page; --cell in the style sheet

  const make = (name, className, text) => {
    const element = document.createElement(name);
    element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Signs instead of what cannot be seen, or turns the direction of what follows.
  const visible = (text) =>
    text
      .replace(/[\u0000-\u001f]/g, (sign) => String.fromCharCode(0x2400 + sign.charCodeAt(0)))
      .replace(/[\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

  const written = (value) => value.toFixed(2).replace("-", "\u2212");

  // From -1 over 0 to 1, in the colours of the style sheet, which has others for the dark.
  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim().split(/\s+/).map(Number);
    const [minus, zero, plus] = ["--heat-minus", "--heat-zero", "--heat-plus"].map(read);
    const colour = (share) => {
      const end = share < 0 ? minus : plus;
      const mixed = zero.map((from, i) => Math.round(from + (end[i] - from) * Math.abs(share)));
      return `rgb(${mixed.join(",")})`;
    };
    return { colour, ink: style.getPropertyValue("--ink"), mark: style.getPropertyValue("--mark") };
  };

  const draw = (fold) => {
    const place = fold.querySelector(".heat");
    if (!place || place.firstChild) return;
    const data = JSON.parse(fold.querySelector(".heat-data").textContent);
    const query = data.query.map(visible);
    const words = data.document.map(visible);
    const bytes = Uint8Array.from(atob(data.similarities), (sign) => sign.charCodeAt(0));
    const cosine = (row, column) => (bytes[row * words.length + column] / 255) * 2 - 1;
    const lowest = bytes.reduce((a, b) => Math.min(a, b), 255) / 127.5 - 1;
    const highest = bytes.reduce((a, b) => Math.max(a, b), 0) / 127.5 - 1;
    let [row, column] = [-1, -1];

    const scroll = make("div", "heat-scroll");
    const across = make("div", "heat-across");
    const down = make("div", "heat-down");
    across.setAttribute("aria-hidden", "true");
    down.setAttribute("aria-hidden", "true");
    const label = (text) => {
      const element = make("bdi", "", text);
      element.title = text;
      return element;
    };
    across.append(...words.map(label));
    down.append(...query.map(label));
    const canvas = make("canvas", "heat-cells");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-roledescription", "heat map");
    canvas.setAttribute(
      "aria-label",
      `Cosines of ${query.length} query tokens, downwards, and ${words.length} document tokens, ` +
        "across. Arrow keys move from cell to cell; the winning pairs are in a table below.",
    );
    scroll.append(make("div", "heat-corner"), across, down, canvas);

    const says = make("p", "heat-says", "Point at a cell or tap it, or use the arrow keys.");
    says.setAttribute("role", "status");
    const scale = make("canvas", "heat-scale");
    scale.setAttribute("aria-hidden", "true");
    const [from, to] = [make("span", ""), make("span", "")];
    const spread = make("input", "");
    spread.type = "checkbox";
    spread.checked = lowest > 0; // a scale from -1 would show little
    const choice = make("label", "");
    choice.append(spread, ` colours from ${written(lowest)} to ${written(highest)} only`);
    const key = make("div", "heat-key");
    key.append(from, scale, to, make("span", "heat-outlined", "winner of its row"), choice);
    place.append(says, scroll, key);

    const share = (value) =>
      spread.checked ? (value - lowest) / (highest - lowest || 1) : value;

    const paint = () => {
      const { colour, ink, mark } = palette();
      const [width, height] = [words.length * CELL, query.length * CELL];
      // Browsers refuse canvases that are too long or too large.
      const sharp = Math.min(
        devicePixelRatio || 1, 16000 / width, 16000 / height, Math.sqrt(16e6 / (width * height)));
      canvas.width = Math.max(1, Math.round(width * sharp));
      canvas.height = Math.max(1, Math.round(height * sharp));
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      const brush = canvas.getContext("2d");
      brush.scale(canvas.width / width, canvas.height / height);
      for (let i = 0; i < query.length; i++) {
        for (let j = 0; j < words.length; j++) {
          brush.fillStyle = colour(share(cosine(i, j)));
          brush.fillRect(j * CELL, i * CELL, CELL - 1, CELL - 1);
        }
      }
      brush.lineWidth = 2;
      brush.strokeStyle = ink;
      data.winners.forEach((j, i) => {
        if (j !== null) brush.strokeRect(j * CELL + 0.5, i * CELL + 0.5, CELL - 2, CELL - 2);
      });
      if (row >= 0) {
        brush.lineWidth = 3;
        brush.strokeStyle = mark;
        brush.strokeRect(column * CELL - 0.5, row * CELL - 0.5, CELL, CELL);
      }
      const range = spread.checked ? [lowest, highest] : [-1, 1];
      [from.textContent, to.textContent] = range.map(written);
      [scale.width, scale.height] = [150, 12];
      const ramp = scale.getContext("2d");
      for (let x = 0; x < 150; x++) {
        ramp.fillStyle = colour(share(range[0] + ((range[1] - range[0]) * x) / 149));
        ramp.fillRect(x, 0, 1, 12);
      }
    };

    const select = (toRow, toColumn) => {
      for (const element of [across.children[column], down.children[row]]) {
        if (element) element.classList.remove("chosen");
      }
      row = Math.min(Math.max(toRow, 0), query.length - 1);
      column = Math.min(Math.max(toColumn, 0), words.length - 1);
      across.children[column].classList.add("chosen");
      down.children[row].classList.add("chosen");
      const wins = data.winners[row] === column ? ", the winner of its row" : "";
      // Isolates keep tokens of other scripts from turning the sentence round.
      says.textContent =
        `“\u2068${query[row]}\u2069” and “\u2068${words[column]}\u2069” (token ${column + 1}): ` +
        `${written(cosine(row, column))}${wins}`;
      paint();
    };
    const point = (event) => {
      const at = [Math.floor(event.offsetY / CELL), Math.floor(event.offsetX / CELL)];
      if (at[0] !== row || at[1] !== column) select(...at);
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("keydown", (event) => {
      const move = {
        ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
        Home: [0, -Infinity], End: [0, Infinity],
      }[event.key];
      if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      if (row < 0) select(0, data.winners[0] ?? 0);
      else select(row + move[0], column + move[1]);
      // Into view, with what the row's labels cover left free.
      const left = column * CELL;
      const room = scroll.clientWidth - down.offsetWidth;
      if (left < scroll.scrollLeft) scroll.scrollLeft = left;
      if (left + CELL > scroll.scrollLeft + room) scroll.scrollLeft = left + CELL - room;
    });
    spread.addEventListener("change", paint);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    paint();
  };

  // The part that the address names is shown, in whatever folds it lies.
  const show = () => {
    const named = document.getElementById(location.hash.slice(1));
    if (!named) return;
    for (let fold = named.closest("details"); fold; fold = fold.parentElement.closest("details")) {
      fold.open = true;
      if (fold.matches(".tokens")) draw(fold);
    }
    named.scrollIntoView();
  };

  for (const fold of document.querySelectorAll("details.tokens")) {
    fold.addEventListener("toggle", () => fold.open && draw(fold));
  }
  addEventListener("hashchange", show);
  show();
})();
