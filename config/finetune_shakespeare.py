# GPT-2 fine-tuned to write like Shakespeare, by nanoGPT's recipe: few steps, a small constant learning rate.
# If memory is short, add --lora_rank=8 --learning_rate=1e-3.
init_from = "gpt2"
dataset = "shakespeare_gpt2"
tokenizer = "gpt2"
out_dir = "out/finetune_shakespeare"
batch_size, tokens_per_step = 1, 32 * 1024
max_iters, eval_interval = 20, 5
optimizer, learning_rate, weight_decay = "adamw", 3e-5, 0.1
beta1, beta2 = 0.9, 0.95
min_lr_frac = 1.0
