# Tiny Shakespeare (1.1 MB of text), sized for a CPU.
dataset = "shakespeare"
vocab_size = 2048
n_layer, n_head, n_embd, block_size = 4, 4, 128, 64
batch_size, max_iters = 8, 600
eval_interval = 100
unembedding_lr = 0.012                  # the default is for wider models
beta1, beta2 = 0.5, 0.99                # a short run: little momentum; small batches are noisy: a long average of squares
window_pattern, window = "S", 4         # all layers but the last see four tokens: learns faster, above all in short runs
