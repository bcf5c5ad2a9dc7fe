"""Let llama.cpp continue a text greedily; needs xllamacpp. Prints the text, log-probabilities and speed as JSON."""

import json
import sys

import xllamacpp

path, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1}
answer = xllamacpp.Server(params).handle_completions(request)
[choice] = answer["choices"]
found = {
    "text": choice["text"],
    "tokens": [token["id"] for token in choice["logprobs"]["content"]],
    "logprobs": [token["logprob"] for token in choice["logprobs"]["content"]],
    "tokens_per_second": answer["timings"]["predicted_per_second"],
}
print(json.dumps(found))
