// Vercel's AI SDK with three providers; each is told a base url and a key, and that is all.
import { createDeepInfra } from '@ai-sdk/deepinfra';
import { createOpenAI } from '@ai-sdk/openai';
import { createReplicate } from '@ai-sdk/replicate';
import { generateImage } from 'ai';
import { readFileSync } from 'node:fs';

const [base, file] = process.argv.slice(2);
const picture = readFileSync(file);
const openai = createOpenAI({ baseURL: `${base}/openai/v1`, apiKey: 'any' });
const deepinfra = createDeepInfra({ baseURL: `${base}/v1`, apiKey: 'any' });
const replicate = createReplicate({ baseURL: `${base}/v1`, apiToken: 'any' });

async function outcome(request) {
  try {
    const { images, warnings } = await generateImage({ prompt: 'a red circle', maxRetries: 0, ...request });
    return { images: images.map((image) => ({ mediaType: image.mediaType, base64: image.base64 })), warnings };
  } catch (error) {
    return { error: error.name, message: error.message, status: error.statusCode };
  }
}

console.log(JSON.stringify({
  openai: await outcome({ model: openai.image('tiny'), providerOptions: { openai: { outputFormat: 'webp' } } }),
  openaiGpt: await outcome({ model: openai.image('gpt-image-2'), size: '1024x1024', n: 2 }),
  openaiRefused: await outcome({ model: openai.image('sd3.5-large'), size: '1000x1000' }),
  openaiEdit: await outcome({ model: openai.image('tiny'), prompt: { text: 'x', images: [picture] } }),
  deepinfra: await outcome({ model: deepinfra.image('tiny'), seed: 7, providerOptions: { deepinfra: { num_inference_steps: 3 } } }),
  deepinfraSize: await outcome({ model: deepinfra.image('stabilityai/sd3.5'), size: '768x512' }),
  deepinfraRatio: await outcome({ model: deepinfra.image('stabilityai/sd3.5'), aspectRatio: '16:9' }),
  deepinfraRefused: await outcome({ model: deepinfra.image('tiny'), size: '100x100' }),
  deepinfraEdit: await outcome({ model: deepinfra.image('tiny'), prompt: { text: 'x', images: [picture] } }),
  replicate: await outcome({ model: replicate.image('stability-ai/stable-diffusion-3.5-large'), aspectRatio: '16:9', seed: 7 }),
  replicateRefused: await outcome({ model: replicate.image('stability-ai/stable-diffusion-3.5-large'), aspectRatio: '7:1' }),
}));
