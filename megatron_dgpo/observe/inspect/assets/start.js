// Which runs the page shows, from its address; page.js reads it from here.

{
  const asked = new URLSearchParams(location.search);
  const runs = ["run", "compare"].filter((name) => asked.has(name)).map((name) => ({ base: asked.get(name) }));
  const element = document.createElement("script");
  element.type = "application/json";
  element.id = "source";
  element.textContent = JSON.stringify({ kind: "fetch", runs });
  document.head.append(element);
}
