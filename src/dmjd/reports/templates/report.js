"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = id => document.getElementById(id);
  const COLORS = ["#2266cc", "#e07b00", "#2a9d3a", "#d1495b", "#8a63d2", "#9a6b4f", "#d65db1", "#7a828e", "#a8a500", "#12a5b8",
    "#7fb0ff", "#ffbf7a", "#8fdc9b", "#ff9aa8", "#c7b2f5", "#d0ab95", "#f5a9dc", "#bcc2cb", "#dcda6a", "#86dbe6"];
  const DASHES = ["solid", "dash", "dot"];
  const color = i => COLORS[i % COLORS.length];
  // plotly reads texts as markup
  const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const cut = (text, most) => text.length > most ? text.slice(0, most - 1) + "…" : text;
  const style = name => getComputedStyle(root).getPropertyValue(name).trim();
  const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "sendDataToCloud"]};
  const plots = [];

  function look() {
    const axis = {gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line")};
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: style("--text"), size: 11, family: "system-ui, sans-serif"},
      hoverlabel: {bgcolor: style("--card"), bordercolor: style("--line"), font: {color: style("--text")}},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--text")},
      xaxis: axis, yaxis: axis,
    };
  }

  function merged(own) {
    const theme = look();
    return {...theme, ...own, xaxis: {...theme.xaxis, ...own.xaxis}, yaxis: {...theme.yaxis, ...own.yaxis}};
  }

  function draw(element, traces, layout, options = {}) {
    plots.push(element);
    return Plotly.newPlot(element, traces, merged(layout), {...config, ...options});
  }

  function repaint() {
    const theme = look();
    const changes = {"font.color": theme.font.color, "hoverlabel.bgcolor": theme.hoverlabel.bgcolor,
      "hoverlabel.bordercolor": theme.hoverlabel.bordercolor, "hoverlabel.font.color": theme.font.color,
      "modebar.color": theme.modebar.color, "modebar.activecolor": theme.modebar.activecolor};
    for (const axis of ["xaxis", "yaxis"])
      for (const part of ["gridcolor", "zerolinecolor", "linecolor"]) changes[`${axis}.${part}`] = theme[axis][part];
    for (const element of plots) Plotly.relayout(element, changes);
  }

  // Light and dark: as the system asks, until the button is pressed.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function setTheme(name) {
    root.dataset.theme = name;
    repaint();
  }
  const wanted = () => chosen ?? (dark.matches ? "dark" : "light");
  setTheme(wanted());
  dark.addEventListener("change", () => setTheme(wanted()));
  byId("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme(chosen);
  });

  // Curves
  const hidden = new Set();
  const several = data.runs.length > 1;
  const panels = [];
  function curveTraces(panel, axis) {
    return panel.curves.map((curve, i) => {
      const few = curve.y.length < 20;
      return {
        type: "scatter", mode: few ? "lines+markers" : "lines", x: curve[axis], y: curve.y,
        name: escaped(cut(several ? data.runs[curve.run] : curve.name, 40)),
        visible: !hidden.has(curve.run), marker: {size: 5},
        line: {width: 1.6, color: several ? color(curve.run) : color(i), dash: several ? DASHES[Math.floor(curve.run / COLORS.length) % 3] : "solid"},
      };
    });
  }
  function curveLayout(panel, axis) {
    const legend = !several && panel.curves.length > 1;
    return {
      margin: {l: 48, r: 8, t: legend ? 26 : 8, b: 36}, xaxis: {title: {text: axis, standoff: 4}, automargin: true},
      yaxis: {automargin: true}, hovermode: several ? "closest" : "x unified",
      showlegend: legend, legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom"},
    };
  }
  function drawPanel(panel) {
    const box = document.createElement("div"), title = document.createElement("h3"), help = document.createElement("p"), plot = document.createElement("div");
    box.className = "panel";
    title.textContent = panel.title;
    help.textContent = panel.help;
    plot.className = "plot";
    plot.setAttribute("role", "img");
    const last = panel.curves[0].y[panel.curves[0].y.length - 1];
    plot.setAttribute("aria-label", `Curve of ${panel.title}` + (several ? ` of ${data.runs.length} runs` : `; last value ${last}`));
    box.append(title, help, plot);
    byId("panels").append(box);
    panels.push([panel, plot]);
    draw(plot, curveTraces(panel, "step"), curveLayout(panel, "step"), {displayModeBar: false});
  }
  function redrawPanels() {
    const axis = byId("axis").value;
    for (const [panel, plot] of panels) Plotly.react(plot, curveTraces(panel, axis), merged(curveLayout(panel, axis)), {...config, displayModeBar: false});
  }
  function runLegend() {
    if (!several) return;
    data.runs.forEach((name, i) => {
      const button = document.createElement("button"), chip = document.createElement("i");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      chip.style.background = color(i);
      button.append(chip, cut(name, 60));
      button.addEventListener("click", () => {
        hidden.has(i) ? hidden.delete(i) : hidden.add(i);
        button.setAttribute("aria-pressed", String(!hidden.has(i)));
        redrawPanels();
      });
      byId("legend").append(button);
    });
  }

  // Map
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const words = text => new Uint16Array(bytes(text).buffer);
  const hasWebGL = () => { try { return !!document.createElement("canvas").getContext("webgl"); } catch { return false; } };
  function mapTraces(map, view, coloring, most, type) {
    const groups = coloring ? coloring.groups : ["images"];
    const parts = groups.map(() => ({x: [], y: [], customdata: []}));
    for (let i = 0; i < Math.min(view.count, most); i++) {
      const part = parts[coloring ? coloring.of[i] : 0];
      part.x.push(view.x[i]);
      part.y.push(view.y[i]);
      part.customdata.push(i);
    }
    const size = view.count > 20000 ? 3 : view.count > 3000 ? 4 : 6;
    return parts.map((part, i) => ({
      ...part, type, mode: "markers", name: escaped(cut(groups[i], 24)), hoverinfo: "none",
      marker: {size, color: groups[i] === "other" ? "#9aa3af" : color(i), opacity: 0.8},
    }));
  }
  function drawMap(map) {
    const plot = byId("scatter"), tip = byId("tip");
    const type = hasWebGL() ? "scattergl" : "scatter", most = type === "scattergl" ? Infinity : 3000;
    for (const view of map.views) [view.x, view.y] = [words(view.x), words(view.y)];
    for (const coloring of map.colorings) coloring.of = bytes(coloring.of);
    const traces = () => mapTraces(map, map.views[byId("view").value], map.colorings[byId("coloring").value], most, type);
    const bare = {showticklabels: false, zeroline: false, ticks: ""};
    const layout = () => {
      const narrow = plot.clientWidth < 600, legend = narrow ? {orientation: "h", y: -0.02} : {y: 0.98};
      return {
        margin: {l: 8, r: 8, t: 32, b: 8}, xaxis: bare, yaxis: bare, hovermode: "closest", dragmode: narrow ? "pan" : "zoom",
        showlegend: byId("coloring").value !== "-1", legend: {...legend, itemsizing: "constant"},
      };
    };
    draw(plot, traces(), layout(), {displayModeBar: true});
    const redraw = () => { tip.hidden = true; Plotly.react(plot, traces(), merged(layout()), {...config, displayModeBar: true}); };
    byId("view").addEventListener("change", redraw);
    byId("coloring").addEventListener("change", redraw);
    const image = tip.querySelector("div"), text = tip.querySelector("p");
    image.style.backgroundImage = `url(${map.sprite})`;
    image.style.backgroundSize = `${128 * map.across}px auto`;
    image.setAttribute("role", "img");
    function show(event) {
      const i = event.points[0].customdata;
      image.hidden = i >= map.tiles;
      image.style.backgroundPosition = `-${128 * (i % map.across)}px -${128 * Math.floor(i / map.across)}px`;
      image.setAttribute("aria-label", map.names[i]);
      text.textContent = [map.names[i], ...map.colorings.map(c => `${c.name}: ${c.groups[c.of[i]]}`)].join("\n");
      tip.hidden = false;
      const {clientX = 0, clientY = 0} = event.event ?? {}, box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(clientX + 16, innerWidth - box.width - 8))}px`;
      tip.style.top = `${Math.max(4, Math.min(clientY + 16, innerHeight - box.height - 8))}px`;
    }
    let narrow = plot.clientWidth < 600;
    addEventListener("resize", () => {
      if (narrow !== plot.clientWidth < 600) redraw();
      narrow = plot.clientWidth < 600;
    });
    plot.on("plotly_hover", show);
    plot.on("plotly_click", show);
    plot.on("plotly_unhover", () => { tip.hidden = true; });
    addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});
  }

  function drawConfusion(confusion) {
    const names = confusion.classes.map(name => escaped(cut(name, 20)));
    const places = names.map((_, i) => i), side = Math.max(300, Math.min(720, 120 + 26 * names.length));
    const plot = byId("confusion"), named = names.length <= 15;
    const ticks = {tickvals: places, ticktext: names, type: "linear", automargin: true, showgrid: false, zeroline: false};
    plot.style.height = `${side}px`;
    plot.style.maxWidth = `${side + 160}px`;
    draw(plot, [{
      type: "heatmap", z: confusion.percent, x: places, y: places, zmin: 0, zmax: 100, 
      colorscale: [[0, "rgba(47,111,214,0.04)"], [1, "rgba(47,111,214,1)"]],
      customdata: confusion.percent.map((_, i) => names.map(name => [names[i], name])),
      hovertemplate: "%{customdata[0]} taken for %{customdata[1]}: %{z} %<extra></extra>",
      texttemplate: named ? "%{z:.0f}" : "", showscale: false, colorbar: {thickness: 10},
    }], {
      margin: {l: 60, r: 8, t: 8, b: 60}, xaxis: {...ticks, title: {text: "prediction"}, tickangle: -45},
      yaxis: {...ticks, title: {text: "ground truth"}, autorange: "reversed"},
    }, {displayModeBar: false});
  }

  // One after the other, so that the page is shown at once. Plotly, which takes longest, is not run before that.
  function runPlotly() {
    const script = document.createElement("script");
    script.textContent = byId("plotly").textContent;
    document.head.append(script);
  }
  const jobs = [runPlotly, runLegend, ...data.panels.map(panel => () => drawPanel(panel))];
  if (data.map) jobs.push(() => drawMap(data.map));
  if (data.confusion) jobs.push(() => drawConfusion(data.confusion));
  function next() {
    const job = jobs.shift();
    if (!job) { root.dataset.ready = "yes"; return; }
    job();
    setTimeout(next, 0);
  }
  const axis = byId("axis");
  if (axis) axis.addEventListener("change", redrawPanels);
  requestAnimationFrame(() => setTimeout(next, 0));

  // On paper: light colors, and figures as wide as their column.
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    for (const details of document.querySelectorAll("details")) details.open = true;
    repaint();
    for (const [, plot] of panels) Plotly.relayout(plot, {width: 310});
    for (const id of ["scatter", "confusion"]) if (byId(id)?.data) Plotly.relayout(byId(id), {width: 640});
  });
  addEventListener("afterprint", () => {
    setTheme(wanted());
    for (const plot of plots) Plotly.relayout(plot, {width: null, autosize: true});
  });
})();
