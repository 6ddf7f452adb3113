/** A request of the playground as code, for people who go on without it. */

/** [name, code] for each language. body: of POST /v1/generations; base: the server's url; keyed: it asks for a key. */
export function snippets(body, base, keyed) {
  const url = base.replace(/\/$/, "");
  return [
    ["curl", curl(body, url, keyed)],
    ["Python", httpx(body, url, keyed)],
    ["OpenAI client", openai(body, url, keyed)],
  ];
}

function curl(body, url, keyed) {
  const key = keyed ? ` \\\n  -H "authorization: Bearer $DARKROOM_API_KEY"` : "";
  const file = body.output_format ?? "png";
  const wait = keyed ? `curl -sS -H "authorization: Bearer $DARKROOM_API_KEY"` : "curl -sS";
  const pictures = range(body.num_images ?? 1).map(
    (n) => `  curl -sSL --fail -o picture-${n}.${file} "$(jq -r '.images[${n}].url' generation.json)"`,
  );
  return `# Ask, and wait up to 60 seconds for the end
curl -sS ${url}/v1/generations -o generation.json \\
  -H 'content-type: application/json' -H 'prefer: wait=60'${key} \\
  -d @- <<'JSON'
${JSON.stringify(body, null, 2)}
JSON

# If that was not enough, look again until it has ended
while jq -e '.status | IN("queued", "running")' generation.json > /dev/null; do
  sleep 2
  ${wait} -o generation.json "$(jq -r .urls.self generation.json)"
done

# The pictures, or why there are none
if jq -e '.status == "succeeded"' generation.json > /dev/null; then
${pictures.join("\n")}
else
  jq '.error // .status' generation.json >&2
  false
fi
`;
}

function httpx(body, url, keyed) {
  const headers = keyed ? `, headers={"authorization": "Bearer " + os.environ["DARKROOM_API_KEY"]}` : "";
  const imports = keyed ? "import os\nimport time" : "import time";
  return `${imports}
from pathlib import Path

import httpx

with httpx.Client(base_url=${python(url)}, timeout=70, follow_redirects=True${headers}) as client:
    answer = client.post("/v1/generations", json=${python(body, 1)})
    answer.raise_for_status()
    generation = answer.json()
    while generation["status"] in ("queued", "running"):
        time.sleep(1)
        generation = client.get(generation["urls"]["self"]).raise_for_status().json()
    assert generation["status"] == "succeeded", generation["error"]
    for n, image in enumerate(generation["images"]):
        picture = client.get(image["url"]).raise_for_status().content
        Path(f"picture-{n}.{image['format']}").write_bytes(picture)
`;
}

function openai(body, url, keyed) {
  const { model, prompt, width, height, num_images: n = 1, output_format: format = "png" } = body;
  const own = {};
  for (const name of ["negative_prompt", "seed", "steps", "guidance_scale", "sampler", "deterministic"]) {
    if (body[name] !== undefined) own[name] = body[name];
  }
  const key = keyed ? `os.environ["DARKROOM_API_KEY"]` : `"none"`;
  return `import base64
${keyed ? "import os\n" : ""}from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=${python(`${url}/openai/v1`)}, api_key=${key})
answer = client.images.generate(
    model=${python(model)},
    prompt=${python(prompt)},
    size="${width}x${height}",
    n=${n},
    output_format=${python(format)},
    response_format="b64_json",
    extra_body=${python(own, 1)},
)
for n, image in enumerate(answer.data):
    Path(f"picture-{n}.${format}").write_bytes(base64.b64decode(image.b64_json))
`;
}

/** A value of JSON as Python writes it; objects at so many levels of indentation. */
function python(value, level = 0) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const entries = Object.entries(value);
  if (!entries.length) return "{}";
  const indent = "    ".repeat(level + 1);
  const lines = entries.map(([name, inner]) => `${indent}${JSON.stringify(name)}: ${python(inner, level + 1)},\n`);
  return `{\n${lines.join("")}${"    ".repeat(level)}}`;
}

function range(count) {
  return [...Array(count).keys()];
}
