"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = read("charts"), frames = read("frames");

  // Colors come from the style sheet, which knows the scheme.
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const color = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const font = getComputedStyle(document.documentElement).fontFamily;
  const touch = matchMedia("(pointer: coarse)").matches;

  const trace = (curve, _, curves) => {
    const stroke = color(`series-${curve.color % 8}`), faint = curve.style === "faint";
    // The nearest point of a curve may be at another step than that under the cursor.
    const isAligned = curves.every((other) => String(other.x) === String(curves[0].x));
    return {
      name: curve.name, x: curve.x, y: curve.y, type: "scatter", showlegend: curve.legend, opacity: faint ? 0.35 : 1,
      mode: curve.style === "points" || curve.x.length === 1 ? "lines+markers" : "lines",
      hovertemplate: isAligned ? "%{y:.4~g}" : "%{y:.4~g} at %{x:,}",
      line: { color: stroke, width: faint ? 1 : 2, dash: curve.style === "points" ? "dot" : "solid" },
      marker: { color: stroke, size: 6 }, hoverinfo: faint && !curve.legend ? "skip" : "all",
    };
  };

  // Plotly labels a logarithmic axis with lone digits.
  const ticks = (chart) => {
    const values = chart.curves.flatMap((curve) => curve.y);
    const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    const decades = Math.log10(high / low), digits =
      decades > 2.5 ? [1] : decades > 1.5 ? [1, 2, 5] : decades > 0.8 ? [1, 2, 3, 5, 7] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8];
    const tickvals = [], ticktext = [];
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const digit of digits) {
        const value = Number(`${digit}e${power}`);
        tickvals.push(value);
        ticktext.push(value < 1e-3 || value >= 1e4 ? value.toExponential() : String(value));
      }
    }
    return { tickmode: "array", tickvals, ticktext };
  };

  const layout = (chart) => {
    const axis = { gridcolor: color("line"), linecolor: color("line"), zeroline: false, automargin: true, fixedrange: touch };
    return {
      paper_bgcolor: color("card"), plot_bgcolor: color("card"), font: { family: font, size: 12, color: color("muted") },
      margin: { l: 8, r: 8, t: 8, b: 8 }, hovermode: "x unified", hoverdistance: -1, dragmode: touch ? false : "zoom",
      showlegend: chart.curves.length > 1, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: {
        ...axis, title: { text: "step", standoff: 6 }, tickformat: ",d", hoverformat: ",d", nticks: 7,
        rangemode: "tozero", spikecolor: color("muted"), spikethickness: 1, spikedash: "solid",
      },
      yaxis: {
        ...axis, type: chart.is_log ? "log" : "linear", exponentformat: "e", minexponent: 4, nticks: 7,
        ...(chart.is_log ? ticks(chart) : { rangemode: "tozero" }),
      },
      hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { family: font, size: 12, color: color("text") } },
    };
  };

  const draw = () => {
    for (const place of document.querySelectorAll(".chart")) {
      const chart = charts[place.dataset.chart];
      Plotly.react(place, chart.curves.map(trace), layout(chart), { displayModeBar: false, responsive: true });
    }
  };

  // The scheme: that of the system, until another is chosen.
  const root = document.documentElement, button = document.getElementById("theme");
  const labels = { "": "◐ Auto", light: "○ Light", dark: "● Dark" }, order = ["", "light", "dark"];
  const choose = (scheme) => {
    scheme ? (root.dataset.theme = scheme) : delete root.dataset.theme;
    button.textContent = labels[scheme];
    draw();
  };
  let scheme = "";
  try { scheme = localStorage.getItem("ddpm_jax-scheme") || ""; } catch { /* a page from a file may have no storage */ }
  choose(scheme in labels ? scheme : "");
  button.addEventListener("click", () => {
    scheme = order[(order.indexOf(root.dataset.theme || "") + 1) % 3];
    try { localStorage.setItem("ddpm_jax-scheme", scheme); } catch { /* it is chosen for now */ }
    choose(scheme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", draw);

  const crisp = (image) => image.classList.toggle("pixelated", image.naturalWidth < 400);
  for (const image of document.querySelectorAll(".screen img")) {
    image.addEventListener("load", () => crisp(image));
    if (image.complete) crisp(image);
  }

  for (const player of document.querySelectorAll(".player")) {
    const shown = frames[player.dataset.run][player.dataset.kind];
    const images = [...player.querySelectorAll("img")], slider = player.querySelector("input");
    const caption = player.querySelector("output"), play = player.querySelector(".play");
    let timer = 0;
    const show = (at) => {
      slider.value = at;
      slider.setAttribute("aria-valuetext", shown[at].caption);
      caption.textContent = shown[at].caption;
      images.forEach((image, i) => { image.src = shown[at].uris[i]; });
    };
    const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶"; play.ariaLabel = "Play"; };
    slider.max = shown.length - 1;
    player.querySelector(".controls").hidden = shown.length < 2;
    slider.addEventListener("input", () => { stop(); show(+slider.value); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      play.textContent = "❚❚";
      play.ariaLabel = "Pause";
      show(+slider.value === shown.length - 1 ? 0 : +slider.value);
      timer = setInterval(() => {
        const next = +slider.value + 1;
        next < shown.length ? show(next) : stop();
      }, Math.max(80, Math.min(600, 6000 / shown.length)));
    });
    // A moment that shows how far x_t and the predicted x_0 are apart; of the grids, the last.
    show(player.dataset.kind === "reverse" ? Math.floor(0.6 * (shown.length - 1)) : shown.length - 1);
  }

  const only = document.getElementById("only"), fields = document.querySelector(".config");
  const filter = () => {
    fields.classList.toggle("only", only.checked);
    document.getElementById("none-differ").hidden = !only.checked || fields.querySelector(".differs") !== null;
  };
  only.addEventListener("change", filter);
  filter();
})();
