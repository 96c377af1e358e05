# GPT-2's architecture and AdamW, on top of any other config: python train.py config/stdlib.py config/classic.py
# The learning rate is the best of 1e-3, 2e-3 and 4e-3 on stdlib (350 steps), and of these and 8e-3 on tiny Shakespeare (1,200
# steps): there 4e-3 is 0.01 bits per byte better with one seed, but 0.09 and 0.17 worse with two others.
pos, norm, mlp, bias = "learned", "layernorm", "gelu", True
qk_norm, tie_weights, zero_init, logit_softcap, n_kv_head, n_inner = False, True, False, 0.0, 0, 0
window_pattern, window = "", 0
optimizer, learning_rate, weight_decay = "adamw", 2e-3, 0.1
beta1, beta2 = 0.9, 0.99
warmup_iters, lr_schedule, min_lr_frac = 50, "cosine", 0.1
