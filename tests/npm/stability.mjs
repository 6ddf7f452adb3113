// npm's stability-ai, which has its host written in: its own axios is told another one, and that is all.
import { createRequire } from 'node:module';
import { readFile } from 'node:fs/promises';

const base = process.argv[2];
const require = createRequire(import.meta.url);
const axios = createRequire(require.resolve('stability-ai'))('axios');
axios.interceptors.request.use((request) => {
  request.url = request.url.replace('https://api.stability.ai', base);
  return request;
});
const StabilityAI = require('stability-ai').default;
const stability = new StabilityAI('sk-any');
const { generate, results, upscale } = stability.v2beta.stableImage;

async function outcome(call) {
  try {
    const result = await call();
    const head = result.filepath ? (await readFile(result.filepath)).subarray(0, 4).toString('hex') : null;
    return { ...result, head };
  } catch (error) {
    return { error: error.name, message: error.message };
  }
}

const accepted = await axios.postForm('https://api.stability.ai/v2beta/stable-image/generate/sd3',
  { prompt: 'a red circle', model: 'tiny' }, { headers: { Prefer: 'respond-async' } });
let async_ = await outcome(() => results.fetchAsyncGenerationResult(accepted.data.id));
for (let tries = 0; async_.status === 'in-progress' && tries < 100; tries += 1) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  async_ = await outcome(() => results.fetchAsyncGenerationResult(accepted.data.id));
}

console.log(JSON.stringify({
  sd3: await outcome(() => generate.sd3('a red circle', { mode: 'text-to-image', model: 'sd3', seed: 7, negativePrompt: 'squares' })),
  turbo: await outcome(() => generate.sd3('a red circle', { model: 'sd3-turbo', outputFormat: 'jpeg' })),
  core: await outcome(() => generate.core('a red circle', { aspectRatio: '16:9' })),
  ultra: await outcome(() => generate.ultra('a red circle')),
  refused: await outcome(() => generate.sd3('a red circle', { aspectRatio: '7:1' })),
  fromPicture: await outcome(() => generate.sd3('x', { mode: 'image-to-image', image: process.argv[3], strength: 0.5 })),
  upscale: await outcome(() => upscale.startCreative(process.argv[3], 'x')),
  async: async_,
}));
