// SPDX-License-Identifier: Apache-2.0
// Renders chat templates with @huggingface/jinja: {templates: [...], cases: [{template, context}]} in, texts out.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(process.argv[2] + "/");
const { Template } = await import(pathToFileURL(require.resolve("@huggingface/jinja")));
const { templates, cases } = JSON.parse(readFileSync(0, "utf-8"));
const compiled = templates.map((source) => new Template(source));
const texts = cases.map(({ template, context }) => {
  try {
    return { text: compiled[template].render(context) };
  } catch (error) {
    return { error: error.message };
  }
});
process.stdout.write(JSON.stringify(texts));
