// Vercel's AI SDK with three providers, as often as it tries by itself; what it asks for comes to nothing.
import { createDeepInfra } from '@ai-sdk/deepinfra';
import { createOpenAI } from '@ai-sdk/openai';
import { createReplicate } from '@ai-sdk/replicate';
import { generateImage } from 'ai';

const [base] = process.argv.slice(2);
const openai = createOpenAI({ baseURL: `${base}/openai/v1`, apiKey: 'any' });
const deepinfra = createDeepInfra({ baseURL: `${base}/v1`, apiKey: 'any' });
const replicate = createReplicate({ baseURL: `${base}/v1`, apiToken: 'any' });

async function outcome(request) {
  try {
    await generateImage({ prompt: 'a red circle', ...request });
    return {};
  } catch (error) {
    return { error: error.name, message: error.message, status: error.statusCode };
  }
}

console.log(JSON.stringify({
  openai: await outcome({ model: openai.image('tiny') }),
  deepinfra: await outcome({ model: deepinfra.image('tiny') }),
  replicate: await outcome({ model: replicate.image('darkroom/tiny'), providerOptions: { replicate: { maxWaitTimeInSeconds: 1 } } }),
}));
