# nanoGPT's documented CPU run on tiny Shakespeare, as a baseline: GPT-2's architecture, AdamW, one byte per token.
# The modern run is shakespeare.py.
dataset = "shakespeare_char"
out_dir = "out/shakespeare_classic"
vocab_size = 256                        # the bytes themselves; this text uses 65 of them
n_layer, n_head, n_embd, block_size = 4, 4, 128, 64
pos, norm, mlp = "learned", "layernorm", "gelu"
qk_norm, tie_weights, zero_init = False, True, False
batch_size, max_iters = 12, 2000
eval_interval = 500
optimizer, learning_rate, weight_decay = "adamw", 1e-3, 0.1
beta1, beta2 = 0.9, 0.99
warmup_iters, lr_schedule, min_lr_frac = 100, "cosine", 0.1
dtype = "float32"
