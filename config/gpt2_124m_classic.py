# GPT-2 124M's own architecture (exactly 124,439,808 parameters) and AdamW recipe: the baseline to beat.
dataset = "fineweb"
tokenizer = "gpt2"
out_dir = "out/gpt2_124m_classic"
vocab_size = 50257
n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
pos, norm, mlp, bias = "learned", "layernorm", "gelu", True
qk_norm, tie_weights, zero_init = False, True, False
batch_size, tokens_per_step = 64, 8 * 64 * 1024
max_iters = 19073                       # 10B tokens
eval_tokens = 10 * 1024 * 1024
optimizer, learning_rate, weight_decay = "adamw", 6e-4, 0.1
beta1, beta2 = 0.9, 0.95
warmup_iters, lr_schedule, decay_frac, min_lr_frac = 700, "cosine", 1.0, 0.1
