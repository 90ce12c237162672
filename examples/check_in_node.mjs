// Run an exported ONNX file in onnxruntime-web, the runtime of browsers, and compare it with onnxruntime's logits.
//
//     npm install onnxruntime-web
//     python examples/sample_run.py model.onnx sample.json
//     node examples/check_in_node.mjs model.onnx sample.json

import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [model, sample] = process.argv.slice(2);
if (!model || !sample) {
  console.error("usage: node check_in_node.mjs model.onnx sample.json");
  process.exit(2);
}
// The package is looked for where the command is run, not where this file lies.
const ort = createRequire(path.resolve("package.json"))("onnxruntime-web");
ort.env.logLevel = "fatal";
const { shape, images, logits } = JSON.parse(fs.readFileSync(sample, "utf8"));
const session = await ort.InferenceSession.create(fs.readFileSync(model), { executionProviders: ["wasm"] });
const feed = { images: new ort.Tensor("float32", Float32Array.from(images), shape) };
const start = performance.now();
const found = (await session.run(feed, ["logits"])).logits.data;
const worst = Math.max(...logits.map((value, index) => Math.abs(value - found[index])));
console.log(`largest difference ${worst.toExponential(1)} on ${shape[0]} images, ${(performance.now() - start).toFixed(0)} ms`);
process.exit(found.length === logits.length && worst <= 1e-4 ? 0 : 4);
