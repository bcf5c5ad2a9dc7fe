"""Let ONNX Runtime continue a text greedily; needs onnxruntime-genai. Prints the same JSON as ``llama_cpp.py``."""

import json
import sys
import time

import numpy as np
import onnxruntime_genai

path, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = onnxruntime_genai.Model(path)
tokenizer = onnxruntime_genai.Tokenizer(model)
given = tokenizer.encode(prompt)
params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(do_sample=False, max_length=len(given) + count)
generator = onnxruntime_genai.Generator(model, params)
generator.append_tokens(given)
logprobs, times = [], []
while not generator.is_done():
    generator.generate_next_token()
    times.append(time.perf_counter())
    logits = np.float64(generator.get_output("logits").reshape(-1, generator.get_output("logits").shape[-1])[-1])
    logprobs.append(logits[generator.get_sequence(0)[-1]] - np.logaddexp.reduce(logits))
tokens = [int(token) for token in generator.get_sequence(0)[len(given) :]]
found = {
    "text": tokenizer.decode(tokens),
    "tokens": tokens,
    "logprobs": logprobs,
    "tokens_per_second": (len(tokens) - 1) / (times[-1] - times[0]),
}
print(json.dumps(found))
