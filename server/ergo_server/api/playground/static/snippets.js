// The same question from a shell and from Python. No key is ever written into them.

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// curl reads `;` and `,` in a file name as its own, unless it is quoted for it once more.
function formFile(name) {
  if (/^[\w.-]+$/.test(name)) return `image=@${name}`;
  return shell(`image=@"${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`);
}

// JSON's strings are Python's, too.
const python = (text) => JSON.stringify(text);

/** `sample` is the path of a sample scene at this server, "" for an image of the user's own. */
export function curl({ origin, name, sample, question, key }) {
  const lines = sample ? [`curl -O ${origin}${sample}`] : [];
  const parts = [`curl -F ${formFile(name)}`, `--form-string ${shell(`question=${question}`)}`];
  if (key) parts.push('-H "Authorization: Bearer $ERGO_API_KEY"');
  return [...lines, [...parts, `${origin}/v1/vqa`].join(" \\\n     ")].join("\n");
}

export function client({ origin, name, question, key }) {
  const note = key ? "  # the key is taken from ERGO_API_KEY" : "";
  return [
    "from ergo_client import Client",
    "",
    `client = Client(${python(origin)})${note}`,
    `answer = client.ask(${python(name)}, ${python(question)})`,
    "print(answer.text)",
  ].join("\n");
}
